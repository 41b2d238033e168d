"""`bmoe model init`: what it finds out of a folder's files, and that `check` agrees with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest

from bmoe.protocol.errors import InputError, ManifestError, ModelError
from bmoe.storage.golden import read_golden, write_golden
from bmoe.storage.manifest import MANIFEST_NAME, Model, render_manifest
from bmoe.storage.onnx_file import read_onnx, read_onnx_file
from bmoe.storage.onnx_inline import inlined
from coordinator.models.check import examine
from coordinator.models.draft import Wishes, draft, model_files
from coordinator.models.tolerance import rounded_up
from coordinator.models.trial import Lab


async def drafted(folder: Path, lab: Lab) -> tuple[Model, list[str]]:
    said: list[str] = []
    return await draft(folder, Wishes(), said.append, lab), said


async def faults(folder: Path, lab: Lab) -> list[str]:
    return [f"{f.subject}: {f.text}" async for f in examine(folder, lab) if not f.good]


async def test_a_folder_of_files_becomes_a_manifest_that_check_finds_true(tmp_path: Path) -> None:
    """Rows that are independent make a batch, a fixed batch of one makes none; the owner's words survive `--force`."""
    for name, data in (("rows", models.mlp()), ("one", models.echo(models.FLOAT, (1, 2)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "expert.onnx").write_bytes(data)
    async with Lab() as lab:
        rows, said = await drafted(tmp_path / "rows", lab)
        one, _ = await drafted(tmp_path / "one", lab)
        assert (rows.name, rows.top_k, rows.experts[0].batch, rows.experts[0].opset) == ("rows", 1, True, 17)
        assert [(o.name, o.dtype, o.dims, o.epsilon > 0) for o in rows.experts[0].outputs] == [
            ("probabilities", "float32", (None, 3), True), ("label", "int64", (None,), False),
        ]  # fmt: skip
        assert any("'label' is int64: must be equal on all boards" in line for line in said)
        assert (one.experts[0].batch, one.experts[0].inputs[0].dims) == (False, (1, 2))
        blank = "model.json: licence and description: still to be filled in by the owner"
        assert await faults(tmp_path / "rows", lab) == [blank]
        _fill_in(tmp_path / "rows", rows)
        assert await faults(tmp_path / "rows", lab) == []
        (tmp_path / "rows" / "expert.onnx").write_bytes(models.mlp(seed=8))
        changed, _ = await drafted(tmp_path / "rows", lab)
        assert (changed.version, changed.licence) == (2, "MIT") and await faults(tmp_path / "rows", lab) == []


def _fill_in(folder: Path, model: Model) -> None:
    (folder / MANIFEST_NAME).write_bytes(render_manifest(replace(model, licence="MIT", description="Rows in.")))


def test_weights_beside_the_file_are_taken_in_and_none_from_outside(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.array([3, 4], "<f4").tobytes())
    path = tmp_path / "expert.onnx"
    path.write_bytes(models.with_external_data("weights.bin"))
    _, (single,) = model_files(tmp_path, "")
    assert single.name == "expert.inlined.onnx" and read_onnx_file(single).external == []
    session = pytest.importorskip("onnxruntime").InferenceSession(single.read_bytes())
    assert session.run(None, {"x": np.array([1, 1], np.float32)})[0].tolist() == [4, 5]
    assert model_files(tmp_path, "")[1] == [single]  # made again, not taken for an expert of its own
    for location in ("../weights.bin", "/etc/hostname", "a/../../weights.bin"):
        path.write_bytes(models.with_external_data(location))
        with pytest.raises(ModelError, match="outside its folder"):
            inlined(path)
    (tmp_path / "link.bin").symlink_to("/etc/hostname")
    path.write_bytes(models.with_external_data("link.bin"))
    with pytest.raises(ModelError, match="outside its folder"):
        inlined(path)


def test_a_golden_pair_of_every_dtype_is_read_back_and_one_that_lies_is_refused() -> None:
    arrays = {name: np.ones((2, 3), name) for name in models.ELEMENT_TYPES} | {"s": np.array(7, np.uint16)}
    found, expected = read_golden(write_golden(arrays, {"y": np.zeros((0, 2), np.float16)}))
    assert {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype.name, a.shape, a.tobytes()) for n, a in arrays.items()
    }
    assert expected["y"].shape == (0, 2)
    assert write_golden(arrays, {}) == write_golden(arrays, {})
    for data in (b"", b"PK\x03\x04 and no more", write_golden(arrays, {})[:-30]):
        with pytest.raises(ManifestError, match=r"not an \.npz file"):
            read_golden(data)


def test_folders_without_a_gate_or_without_experts_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.onnx file"):
        model_files(tmp_path, "")
    for index in (10, 2):
        (tmp_path / f"expert-{index}.onnx").write_bytes(models.mlp())
    with pytest.raises(InputError, match=r"2 experts need a gate: call its file gate\.onnx, or name it with --gate"):
        model_files(tmp_path, "")
    (tmp_path / "gate.onnx").write_bytes(models.mlp())
    gate, experts = model_files(tmp_path, "")
    assert gate is not None and [path.name for path in experts] == ["expert-2.onnx", "expert-10.onnx"]


def test_what_a_file_says_is_read_as_onnxruntime_reads_it() -> None:
    found = read_onnx(models.mlp())
    assert (found.opsets, [o.name for o in found.operators][-1]) == ({"": 17}, "ArgMax")
    assert [(v.name, v.dtype, v.dims) for v in found.inputs] == [("x", "float32", ("N", 4))]
    assert (
        read_onnx(models.echo(dims=None)).inputs[0].dims is None
        and read_onnx(models.echo(dims=[])).inputs[0].dims == ()
    )


@pytest.mark.parametrize(("value", "rounded"), [(1e-5, 1e-5), (1.1e-5, 2e-5), (5.2e-6, 1e-5), (3.0, 5.0)])
def test_a_tolerance_is_rounded_up_to_one_two_or_five(value: float, rounded: float) -> None:
    assert rounded_up(value) == pytest.approx(rounded)
