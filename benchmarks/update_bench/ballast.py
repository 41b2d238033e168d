"""A model of one expert of a given size, each version another file: what is carried in the benchmark."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bmoe.storage.golden import write_golden
from bmoe.storage.manifest import Expert, Golden, Model, TensorSpec, render_manifest

NAME, WIDTH = "ballast", 8
OPSET, IR = 17, 8


def write_ballast(folder: Path, version: int, size: int) -> Path:
    """A folder with model.json; `size` is the ONNX file's in bytes, give or take a kilobyte. y = x W1 W2."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(version)
    wide = size // (2 * 4 * WIDTH)
    first, second = (dice.standard_normal(shape, np.float32) / 100 for shape in ((WIDTH, wide), (wide, WIDTH)))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])],
        NAME,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", WIDTH])],
        [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    (folder / "expert.onnx").write_bytes(data := model.SerializeToString())
    given = dice.standard_normal((4, WIDTH), np.float32)
    (folder / "golden.npz").write_bytes(golden := write_golden({"x": given}, {"y": given @ first @ second}))
    given_spec = TensorSpec("x", "float32", (None, WIDTH))
    expert = Expert(
        NAME, "expert.onnx", *_facts(data), OPSET, 64, True, (given_spec,),
        (TensorSpec("y", "float32", (None, WIDTH), 1e-3),), None, Golden("golden.npz", *_facts(golden)),
    )  # fmt: skip
    what = "Random numbers of a given size, to be carried."
    manifest = Model(1, NAME, version, "Apache-2.0", what, 1, "weighted_sum", (), None, (expert,))
    (folder / "model.json").write_bytes(render_manifest(manifest))
    onnx.checker.check_model(model)
    return folder


def _facts(data: bytes) -> tuple[str, int]:
    return hashlib.sha256(data).hexdigest(), len(data)
