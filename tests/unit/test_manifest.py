"""The model manifest: strict to read, true of its files, and the wearable model does what its card says."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import by_path

from bmoe.protocol.errors import ConfigError, ManifestError
from bmoe.storage import packaged as packaged_module
from bmoe.storage.manifest import (
    MAX_MANIFEST_BYTES,
    Expert,
    Model,
    load_model,
    manifest_digest,
    parse_manifest,
    parts,
    read_part,
    render_manifest,
)
from bmoe.storage.packaged import packaged

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = Path(__file__).resolve().parents[2]
WEARABLE = packaged("models", "wearable")
MANIFEST = (WEARABLE / "model.json").read_bytes()


def spoiled(*path: Any, value: Any) -> bytes:
    """The wearable manifest with one value replaced, or removed where `value` is `...`."""
    tree = json.loads(MANIFEST)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return json.dumps(tree).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------------------------


def test_what_we_write_we_read_back() -> None:
    model = parse_manifest(MANIFEST)
    assert render_manifest(model) == MANIFEST
    assert (model.name, model.top_k, len(model.experts), len(model.labels)) == ("wearable", 2, 6, 7)
    assert len(manifest_digest(MANIFEST)) == 32
    assert manifest_digest(MANIFEST) != manifest_digest(MANIFEST + b"\n")


EXPERT_0 = ("experts", 0)
OUTPUT_0 = ("experts", 0, "outputs", 0)
SPOILED = [
    (("format",), 2, "$.format: expected one of 1, got 2"),
    (("format",), True, "$.format: expected one of 1, got True"),
    (("surprise",), 1, "$: expected only the keys format,"),
    (("licence",), ..., "$.licence: expected a value, got 'no such key'"),
    (("name",), "../wearable", "$.name: expected 1..32 of a-z"),
    (("name",), "wearable\n", "$.name: expected"),
    (("version",), 1.0, "$.version: expected an integer"),
    (("version",), 0, "$.version: expected an integer"),
    (("top_k",), True, "$.top_k: expected an integer"),
    (("top_k",), 7, "$.top_k: expected at most the 6 experts there are, got 7"),
    (("combine",), "mean", "$.combine: expected one of 'weighted_sum', got 'mean'"),
    (("labels",), ["A", "B"], "$.labels: expected as many labels as an output's last dim"),
    (("labels", 1), "PEN", "$.labels: expected different labels, got 'PEN twice'"),
    (("labels", 0), "\x1b[31m", "$.labels[0]: expected"),
    (("description",), "\ud800", "$.description: expected"),
    (("experts",), [], "$.experts: expected a list of 1..256, got 'a list of 0'"),
    (("experts",), {}, "$.experts: expected a list of 1..256, got {}"),
    (("gate",), None, "$.gate: expected a gate for 6 experts"),
    (("gate", "outputs", 0, "dtype"), "int64", "$.gate.outputs[0].epsilon: expected 0 for int64"),
    (("gate", "outputs", 0, "dims"), [None, 5], "$.gate.outputs: expected one float output, the scores [null, 6]"),
    (("gate", "outputs", 0, "dims"), [None], "$.gate.outputs: expected one float output"),
    (("gate", "inputs", 0, "dims"), [None, 6, 99], "$.gate.inputs[0]: expected an input that the experts have too"),
    (("gate", "batch"), False, "$.gate.batch: expected that of $.experts[0], True"),
    (("name",), "-wearable", "$.name: expected 1..32 of a-z"),
    ((*EXPERT_0, "name"), "expert-1", "$.experts: expected different names, got 'expert-1 twice'"),
    ((*EXPERT_0, "file"), "expert-1.onnx", "$.experts: expected different file names"),
    ((*EXPERT_0, "file"), "model.json", "$.experts: expected different file names"),
    ((*EXPERT_0, "file"), "../expert-0.onnx", "$.experts[0].file: expected a plain file name"),
    ((*EXPERT_0, "file"), "/etc/passwd", "$.experts[0].file: expected a plain file name"),
    ((*EXPERT_0, "file"), "..", "$.experts[0].file: expected a plain file name"),
    ((*EXPERT_0, "sha256"), "AB" * 32, "$.experts[0].sha256: expected 64 lower-case"),
    ((*EXPERT_0, "bytes"), 2**31, "$.experts[0].bytes: expected an integer"),
    ((*EXPERT_0, "memory_mb"), -1, "$.experts[0].memory_mb: expected an integer"),
    ((*EXPERT_0, "batch"), 1, "$.experts[0].batch: expected one of True, False, got 1"),
    (("experts", 1, "batch"), False, "$.experts[1].batch: expected that of $.experts[0], True"),
    ((*EXPERT_0, "golden"), None, "$.experts[0].golden: expected an object, got None"),
    ((*EXPERT_0, "golden", "file"), "expert-0.onnx", "$.experts: expected different file names"),
    ((*EXPERT_0, "inputs", 0, "epsilon"), 0, "$.experts[0].inputs[0]: expected only the keys name, dtype, dims"),
    ((*EXPERT_0, "inputs", 0, "dtype"), "complex64", "$.experts[0].inputs[0].dtype: expected one of 'float32'"),
    ((*EXPERT_0, "inputs", 0, "dims"), [None, 6, 0], "$.experts[0].inputs[0].dims[2]: expected an integer"),
    ((*EXPERT_0, "inputs", 0, "dims"), [4, 6, 100], "$.experts[0].inputs[0].dims: expected null first"),
    ((*EXPERT_0, "inputs", 0, "name"), "win dow", "$.experts[0].inputs[0].name: expected"),
    ((*OUTPUT_0, "name"), "other", "$.experts[1].outputs: expected those of $.experts[0]"),
    ((*OUTPUT_0, "epsilon"), 0, "$.experts[0].outputs[0].epsilon: expected above 0 for float32, got 0.0"),
    ((*OUTPUT_0, "epsilon"), -1e-5, "$.experts[0].outputs[0].epsilon: expected a finite number"),
    ((*OUTPUT_0, "epsilon"), True, "$.experts[0].outputs[0].epsilon: expected a finite number"),
    ((*OUTPUT_0, "epsilon"), ..., "$.experts[0].outputs[0].epsilon: expected a value"),
]


@pytest.mark.parametrize(("path", "value", "message"), SPOILED)
def test_one_wrong_value_is_refused_by_path(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert refusal(spoiled(*path, value=value)).startswith(message)


def test_an_integer_output_tolerates_nothing() -> None:
    alone = json.loads(spoiled("gate", value=None))
    alone.update(experts=alone["experts"][:1], top_k=1)
    assert parse_manifest(json.dumps(alone).encode()).gate is None
    output = alone["experts"][0]["outputs"][0]
    output["dtype"] = "int8"
    assert "epsilon: expected 0 for int8" in refusal(json.dumps(alone).encode())
    output["epsilon"] = 0
    assert parse_manifest(json.dumps(alone).encode()).experts[0].outputs[0].epsilon == 0


HOSTILE = [
    (b"\xff\xfe", "UnicodeDecodeError"),
    (b"\xef\xbb\xbf" + MANIFEST, "JSONDecodeError"),
    (MANIFEST[:-3], "JSONDecodeError"),
    (MANIFEST.replace(b"{", b'{"format": 1,', 1), "a key is given twice"),
    (MANIFEST.replace(b'"top_k": 2', b'"top_k": NaN'), "NaN is not a JSON number"),
    (MANIFEST.replace(b'"epsilon": 1e-05', b'"epsilon": 1e999', 1), "expected a finite number"),
    (MANIFEST.replace(b'"top_k": 2', b'"top_k": ' + b"9" * 500_000), "a number of 500000 digits"),
    (b"[" * 500_000, "RecursionError"),
    (MANIFEST + b" " * MAX_MANIFEST_BYTES, "expected at most 1048576 bytes"),
    (b"null", "$: expected an object, got None"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_hostile_bytes_get_one_clear_error(data: bytes, message: str) -> None:
    told = refusal(data)
    assert message in told
    assert len(told) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data(), json_values)
def test_whatever_stands_in_any_place_is_refused_or_read_back(data: st.DataObject, value: Any) -> None:
    tree = json.loads(MANIFEST)
    node: Any = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = copy.deepcopy(value)
    try:
        model = parse_manifest(json.dumps(tree).encode())
    except ManifestError:
        return
    assert parse_manifest(render_manifest(model)) == model


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WEARABLE, tmp_path / "wearable"))


def test_a_true_folder_loads(folder: Path) -> None:
    model = load_model(folder)
    assert model == parse_manifest(MANIFEST)
    assert len(parts(model)) == 14


def test_one_flipped_bit_in_an_expert_is_refused(folder: Path) -> None:
    path = folder / "expert-3.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"expert-3\.onnx: expected SHA-256 [0-9a-f]{64}, found"):
        load_model(folder)


def test_an_expert_with_something_appended_is_refused(folder: Path) -> None:
    with (folder / "gate.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ManifestError, match=r"gate\.onnx: expected \d+ bytes, found more"):
        load_model(folder)


def test_two_swapped_experts_are_refused(folder: Path) -> None:
    first, second = folder / "expert-0.onnx", folder / "expert-1.onnx"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(ManifestError, match=r"expert-0\.onnx: expected SHA-256"):
        load_model(folder)


def test_a_missing_or_odd_file_is_refused(folder: Path) -> None:
    (folder / "golden-expert-2.npz").unlink()
    with pytest.raises(ManifestError, match=r"golden-expert-2\.npz: expected a file of \d+ bytes, found none"):
        load_model(folder)
    (folder / "golden-expert-2.npz").mkdir()
    with pytest.raises(ManifestError, match="found none"):
        load_model(folder)
    (folder / "model.json").unlink()
    with pytest.raises(ManifestError, match=r"model\.json: expected a model manifest"):
        load_model(folder)


# --- where the data lies -------------------------------------------------------------------------------------------


def test_packaged_finds_the_folder_in_a_checkout() -> None:
    assert (packaged("models", "wearable") / "MODEL.md").is_file()


@pytest.mark.parametrize(
    ("kind", "name"), [("models", ".."), ("models", "../bmoe"), ("models", "a/b"), ("models", ""), ("bmoe", "storage")]
)
def test_packaged_gives_nothing_outside_its_two_kinds(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a plain name in models or firmware_configs"):
        packaged(kind, name)


def test_packaged_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"expected a folder 'nosuch'; there are: .*wearable"):
        packaged("models", "nosuch")


def test_an_installed_wheel_reads_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an installed package, site-packages/models may be a stranger's: it must not be read."""
    (tmp_path / "bmoe" / "storage").mkdir(parents=True)
    ours, strange = tmp_path / "bmoe" / "_data" / "models" / "wearable", tmp_path / "models" / "wearable"
    ours.mkdir(parents=True)
    strange.mkdir(parents=True)
    monkeypatch.setattr(packaged_module, "__file__", str(tmp_path / "bmoe" / "storage" / "packaged.py"))
    assert packaged("models", "wearable") == ours


def test_the_wheel_ships_every_file_the_manifest_names() -> None:
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    shipped = set(by_path(ROOT / "setup.py").shipped_files(ROOT))
    named = {f"models/wearable/{part.file}" for part in parts(parse_manifest(MANIFEST))}
    assert named | {"models/wearable/model.json", "models/wearable/MODEL.md"} <= shipped
    assert not any(name.endswith(".py") and name.startswith("models/") for name in shipped)


# --- the wearable model --------------------------------------------------------------------------------------------


def infer(expert: Expert, window: np.ndarray) -> np.ndarray:
    ort = pytest.importorskip("onnxruntime", reason="an expert needs onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(read_part(WEARABLE, expert), options, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [(i.name, list(i.dims[1:])) for i in expert.inputs]
    return session.run([expert.outputs[0].name], {expert.inputs[0].name: window})[0]


def test_a_model_is_cacheable_only_where_its_manifest_says_so() -> None:
    tree = json.loads((WEARABLE / "model.json").read_bytes())
    assert parse_manifest(json.dumps(tree).encode()).cacheable is False
    model = parse_manifest(json.dumps({**tree, "cacheable": True}).encode())
    assert model.cacheable and parse_manifest(render_manifest(model)) == model
    with pytest.raises(ManifestError, match=r"\$\.cacheable: expected one of True, False, got 1"):
        parse_manifest(json.dumps({**tree, "cacheable": 1}).encode())


def all_parts(model: Model) -> list[Expert]:
    assert model.gate
    return [model.gate, *model.experts]


def test_golden_pairs_are_reproduced_within_epsilon() -> None:
    for expert in all_parts(load_model(WEARABLE)):
        assert expert.golden
        with np.load(io.BytesIO(read_part(WEARABLE, expert.golden)), allow_pickle=False) as golden:
            output = expert.outputs[0]
            expected = golden[f"out.{output.name}"]
            found = infer(expert, golden["in.window"])
        assert found.shape == expected.shape == (4, output.dims[1])
        assert np.abs(found.astype(np.float64) - expected).max() <= output.epsilon
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)  # probabilities, as the gate rule needs


def test_held_out_wearers_are_recognised_as_the_card_says() -> None:
    recordings = by_path(WEARABLE / "data.py")
    try:
        window, label = recordings.held_out()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = load_model(WEARABLE)
    assert model.gate and model.labels == recordings.LABELS
    scores = infer(model.gate, window)
    # The coordinator's rule, written out: highest scores (ties: lower index), renormalised in float64.
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : model.top_k]
    weights = np.take_along_axis(scores, chosen, axis=1).astype(np.float64)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    answer = np.zeros((len(window), len(model.labels)), np.float32)
    for number, expert in enumerate(model.experts):
        rows, slots = np.nonzero(chosen == number)
        assert len(rows) > 0.05 * len(window), f"{expert.name} is hardly ever activated"
        answer[rows] += weights[rows, slots, None] * infer(expert, window[rows])
    accuracy = float((answer.argmax(axis=1) == label).mean())
    card = re.search(r"held-out windows \| \*\*([0-9.]+)\*\*", (WEARABLE / "MODEL.md").read_text(encoding="utf-8"))
    assert card and abs(accuracy - float(card[1])) < 0.01


def test_a_planted_pickle_runs_nothing(tmp_path: Path) -> None:
    recordings = by_path(ROOT / "models" / "wearable" / "data.py")
    planted = tmp_path / "planted"
    attack = b"cos\nsystem\n(S'touch " + str(planted).encode() + b"'\ntR."
    with pytest.raises(Exception, match=r"expected only numpy arrays, found os\.system"):
        recordings._ArraysOnly(io.BytesIO(attack)).load()
    assert not planted.exists()
