"""A model of one expert of a given size, each version another file: what is carried in the benchmark."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bmoe.storage.golden import write_golden

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
    dims = [None, WIDTH]
    expert = {
        "name": NAME, "file": "expert.onnx", **_file(data), "opset": OPSET, "memory_mb": 64, "batch": True,
        "inputs": [{"name": "x", "dtype": "float32", "dims": dims}],
        "outputs": [{"name": "y", "dtype": "float32", "dims": dims, "epsilon": 1e-3}],
        "golden": {"file": "golden.npz", **_file(golden)},
    }  # fmt: skip
    manifest = {
        "format": 1, "name": NAME, "version": version, "licence": "Apache-2.0", "top_k": 1, "combine": "weighted_sum",
        "description": "Random numbers of a given size, to be carried.", "experts": [expert],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(manifest, indent=1) + "\n")
    onnx.checker.check_model(model)
    return folder


def _file(data: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
