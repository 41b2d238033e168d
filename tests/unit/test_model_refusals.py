"""Models that cannot be served are refused with the reason, in one line, before anybody is asked to serve them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as m
import pytest
from inference_helpers import in_process, rows

from bmoe.protocol.errors import BmoeError, ModelError
from bmoe.storage.golden import write_golden
from bmoe.storage.manifest import Expert, Golden, Model, TensorSpec, render_manifest
from bmoe.storage.onnx_file import read_onnx
from bmoe.storage.onnx_rules import check_servable
from coordinator.models.check import examine
from coordinator.models.draft import Wishes, draft
from coordinator.models.trial import Lab

X, Y = m.value("x", m.FLOAT, ["N", 2]), m.value("y", m.FLOAT, ["N", 2])
INT32 = 6
WEIGHTS = m.tensor("w", np.full((4, 3), 127, np.int8))


def with_domain(node: bytes, domain: str) -> bytes:
    return node + m.field(7, domain)


def branch(nodes: list[bytes], output: bytes, initializers: list[bytes] | None = None) -> bytes:
    return m.graph(nodes, [], [output], initializers or [])


def random_in_if_in_loop() -> bytes:
    """A RandomNormal in the branch of an If in the body of a Loop."""
    noise = branch([m.node("RandomNormalLike", ["v"], ["b"])], m.value("b", m.FLOAT, ["N", 2]))
    body = m.graph(
        [m.node("If", ["c"], ["v_out"], then_branch=noise, else_branch=noise), m.node("Identity", ["c"], ["c_out"])],
        [m.value("i", m.INT64, []), m.value("c", m.BOOL, []), m.value("v", m.FLOAT, ["N", 2])],
        [m.value("c_out", m.BOOL, []), m.value("v_out", m.FLOAT, ["N", 2])],
    )
    loop = m.node("Loop", ["turns", "yes", "x"], ["y"], body=body)
    return m.model(m.graph([loop], [X], [Y], [m.tensor("turns", np.array(2)), m.tensor("yes", np.array(True))]))


def dropout(training: bool) -> bytes:
    node = m.node("Dropout", ["x", "ratio", "training"], ["y"])
    constants = [m.tensor("ratio", np.array(0.5, np.float32)), m.tensor("training", np.array(training))]
    return m.model(m.graph([node], [X], [Y], constants))


def int8_made_while_running() -> bytes:
    inputs = [m.value("x", 2, ["N", 4]), m.value("w", 3, [4, 3])]
    return m.model(m.graph([m.node("MatMulInteger", ["x", "w"], ["y"])], inputs, [m.value("y", INT32, ["N", 3])]))


def int8_of_the_outer_graph() -> bytes:
    """Weights outside, the product inside an If: beyond the reach of onnxruntime's exact mode."""
    inner = branch([m.node("MatMulInteger", ["x", "w"], ["b"])], m.value("b", INT32, ["N", 3]))
    node = m.node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    inputs = [m.value("x", 2, ["N", 4]), m.value("c", m.BOOL, [])]
    return m.model(m.graph([node], inputs, [m.value("y", INT32, ["N", 3])], [WEIGHTS]))


def int8_constant() -> bytes:
    node = m.node("MatMulInteger", ["x", "w"], ["y"])
    return m.model(m.graph([node], [m.value("x", 2, ["N", 4])], [m.value("y", INT32, ["N", 3])], [WEIGHTS]))


def custom(domain: str) -> bytes:
    return m.model(m.graph([with_domain(m.node("Fancy", ["x"], ["y"]), domain)], [X], [Y]))


def of_opset(version: int) -> bytes:
    body = m.graph([m.node("Identity", ["x"], ["y"])], [X], [Y])
    return m.field(1, m.IR_VERSION) + m.field(7, body) + m.field(8, m.field(1, "") + m.field(2, version))


def huge() -> bytes:
    """A weight that says of itself to be 4 GiB in a file of a hundred bytes."""
    data = m.echo()
    return data + m.varint(7 << 3 | 2) + m.varint(1 << 32) + b"tiny"


REFUSED: dict[str, tuple[bytes, str]] = {
    "weights above the folder": (
        m.with_external_data("../../etc/passwd"),
        r"'\.\./\.\./etc/passwd', outside its folder",
    ),
    "weights at a path from the root": (m.with_external_data("/etc/passwd"), "'/etc/passwd', outside its folder"),
    "weights in a file beside it": (m.with_external_data("w.bin"), "in another file, 'w.bin'"),
    "an operator of a library": (
        custom("com.example"),
        "'Fancy' is of the domain 'com.example', which needs a library",
    ),
    "a sequence": (m.sequence_output(), "output 'y' is a sequence, only tensors .* options={'zipmap': False}"),
    "text": (m.echo(m.STRING), "input 'x' is of string, .* encode text to numbers"),
    "bfloat16": (m.echo(16), "input 'x' is of bfloat16, .* Casts"),
    "noise within If within Loop": (
        random_in_if_in_loop(),
        r"'RandomNormalLike' \(in Loop body, If then_branch\) draws",
    ),
    "dropout that trains": (dropout(True), "Dropout is, or can be, in training mode"),
    "int8 weights made while it runs": (int8_made_while_running(), "int8 weights 'w' that are no constant .* saturate"),
    "int8 weights of the outer graph": (
        int8_of_the_outer_graph(),
        r"'MatMulInteger' \(in If then_branch\) .* saturate",
    ),
    "an opset of tomorrow": (of_opset(99), r"opset 99 of ai\.onnx: boards take 7\.\.21"),
    "a size that cannot be": (huge(), "claims 4294967296 bytes, 4 are left: cut short"),
    "half a file": (m.mlp()[: len(m.mlp()) // 2], "cut short|not an ONNX"),
    "no ONNX at all": (b"GIF89a, said the file", "not an ONNX|cut short|bytes, .* are left"),
    "nothing": (b"", "expected one graph, found 0"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_served_is_refused_by_what_it_says_of_itself(data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        check_servable(read_onnx(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [dropout(False), int8_constant(), m.mlp(), m.slow()], ids=["dropout", "int8", "mlp", "loop"]
)
def test_what_only_looks_like_it_is_not_refused(data: bytes) -> None:
    check_servable(read_onnx(data))


def test_int8_products_by_a_constant_are_exact() -> None:
    """The rule rests on this: the exact mode of our sessions mends constants."""
    (y,) = in_process(int8_constant(), {"x": np.full((2, 4), 255, np.uint8)})
    assert (y == 255 * 127 * 4).all()


# A folder whose manifest, file or golden pair is not true.


def drafted(folder: Path) -> None:
    async def run() -> None:
        async with Lab() as lab:
            await draft(folder, Wishes(), lambda _: None, lab)

    asyncio.run(run())


def described(folder: Path) -> dict[str, Any]:
    """A good model with a manifest that is true, ready to be published."""
    data, x = m.mlp(), rows(4)
    probabilities, label = in_process(data, {"x": x})
    golden = write_golden({"x": x}, {"probabilities": probabilities, "label": label})
    for name, content in (("expert.onnx", data), ("golden.npz", golden)):
        (folder / name).write_bytes(content)
    outputs = (TensorSpec("probabilities", "float32", (None, 3), 1e-5), TensorSpec("label", "int64", (None,)))
    expert = Expert(
        name="expert", file="expert.onnx", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), opset=m.OPSET,
        memory_mb=16, batch=True, inputs=(TensorSpec("x", "float32", (None, 4)),), outputs=outputs,
        golden=Golden("golden.npz", hashlib.sha256(golden).hexdigest(), len(golden)),
    )  # fmt: skip
    model = Model(
        format=1, name="good", version=1, licence="Apache-2.0", description="four numbers to three classes", top_k=1,
        combine="weighted_sum", labels=(), gate=None, experts=(expert,),
    )  # fmt: skip
    return json.loads(render_manifest(model))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("good")
    return folder, described(folder)


def faults(folder: Path) -> list[str]:
    async def all_of_them() -> list[str]:
        async with Lab() as lab:
            return [f"{f.subject}: {f.text}" async for f in examine(folder, lab) if not f.good]

    return asyncio.run(all_of_them())


def _wrong_columns(manifest: dict[str, Any], folder: Path) -> None:
    manifest["experts"][0]["inputs"][0]["dims"] = [None, 5]


def _wrong_dtype(manifest: dict[str, Any], folder: Path) -> None:
    manifest["experts"][0]["outputs"][1] |= {"dtype": "int32"}


def _wrong_name(manifest: dict[str, Any], folder: Path) -> None:
    manifest["experts"][0]["outputs"][0]["name"] = "scores"


def _other_weights(manifest: dict[str, Any], folder: Path) -> None:
    """Another model under the same golden pair."""
    data = m.mlp(seed=8)
    (folder / "expert.onnx").write_bytes(data)
    manifest["experts"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _cut_short(manifest: dict[str, Any], folder: Path) -> None:
    (folder / "expert.onnx").write_bytes(m.mlp()[:-9])


def _blank(manifest: dict[str, Any], folder: Path) -> None:
    manifest["licence"] = "FILL IN: an SPDX identifier"


def _no_golden(manifest: dict[str, Any], folder: Path) -> None:
    del manifest["experts"][0]["golden"]


def _starved(manifest: dict[str, Any], folder: Path) -> None:
    """Weights of 14 MB, said to need 1 MB."""
    weights = [m.tensor("w1", np.zeros((4, 500_000), np.float32)), m.tensor("w2", np.zeros((500_000, 3), np.float32))]
    nodes = [
        m.node("MatMul", ["x", "w1"], ["h"]),
        m.node("MatMul", ["h", "w2"], ["probabilities"]),
        m.node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    outputs = [m.value("probabilities", m.FLOAT, ["N", 3]), m.value("label", m.INT64, ["N"])]
    data = m.model(m.graph(nodes, [m.value("x", m.FLOAT, ["N", 4])], outputs, weights))
    (folder / "expert.onnx").write_bytes(data)
    changed = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "memory_mb": 1}
    manifest["experts"][0] |= changed


UNTRUE: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "other columns": (_wrong_columns, "declares input 'x' as float32[None, 5], the file says float32['N', 4]"),
    "another dtype": (_wrong_dtype, "declares output 'label' as int32"),
    "another name": (_wrong_name, "declares the outputs ['scores', 'label'], the file has ['probabilities', 'label']"),
    "another model": (_other_weights, "the golden pair is not reproduced: output"),
    "cut short": (_cut_short, "bytes, found"),
    "not filled in": (_blank, "licence: still to be filled in by the owner"),
    "no golden pair": (_no_golden, "no golden pair: `bmoe model init"),
    "too little memory": (_starved, "bytes, the worker may use 1048576"),
}


@pytest.mark.parametrize(("spoil", "reason"), UNTRUE.values(), ids=UNTRUE)
def test_a_manifest_that_is_not_true_is_one_line_and_no_publication(
    good: tuple[Path, dict[str, Any]], tmp_path: Path, spoil: Callable[[dict[str, Any], Path], None], reason: str
) -> None:
    source, manifest = good
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = json.loads(json.dumps(manifest))
    spoil(changed, tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(changed))
    found = faults(tmp_path)
    assert len(found) == 1 and reason in found[0] and "\n" not in found[0], found


def test_the_good_one_has_no_fault(good: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = good
    (folder / "model.json").write_text(json.dumps(manifest))
    assert faults(folder) == []


def test_init_refuses_what_check_would(tmp_path: Path) -> None:
    (tmp_path / "expert.onnx").write_bytes(random_in_if_in_loop())
    with pytest.raises(BmoeError, match=r"expert\.onnx: operator 'RandomNormalLike'"):
        drafted(tmp_path)
    assert not (tmp_path / "model.json").exists()
