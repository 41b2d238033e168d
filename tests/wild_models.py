"""Models as people have them: made by unlike exporters at test time, or taken from packages that ship them.

Nothing here is committed as a file: exporters are of the `dev` extra, packages of the Makefile's WILD.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
EXPERT = "expert.onnx"


@dataclass(frozen=True)
class Wild:
    """One model: who exported it, how its files come into a folder, real inputs for it, and what it must show."""

    name: str
    exporter: str
    write: Callable[[Path], None]
    inputs: Callable[[np.random.Generator], Arrays]
    batch: bool
    opset: int


def packaged_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed: see the Makefile's WILD"
    return Path(spec.submodule_search_locations[0]) / path


def _shipped(package: str, path: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / EXPERT).write_bytes(packaged_file(package, path).read_bytes())

    return write


def _table(draw: np.random.Generator, rows: int) -> Arrays:
    return {"kind": draw.integers(0, 3, (rows, 1)), "dose": draw.standard_normal((rows, 2)).astype(np.float32)}


def _sklearn(folder: Path) -> None:
    """A pipeline over an int64 and two float32 columns: label int64 and probabilities, operators of ai.onnx.ml."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    draw = np.random.default_rng(3)
    table = _table(draw, 200)
    x = np.concatenate([table["kind"], table["dose"]], axis=1)
    pipeline = make_pipeline(
        ColumnTransformer([("kind", OneHotEncoder(), [0]), ("dose", StandardScaler(), [1, 2])]), LogisticRegression()
    ).fit(x, draw.integers(0, 3, 200))
    types = [("kind", Int64TensorType([None, 1])), ("dose", FloatTensorType([None, 2]))]
    options = {"zipmap": False}
    made = to_onnx(pipeline, initial_types=types, target_opset={"": 9, "ai.onnx.ml": 1}, options=options)
    (folder / EXPERT).write_bytes(made.SerializeToString())


def _lightgbm(folder: Path) -> None:
    """Boosted trees: a TreeEnsembleRegressor."""
    import lightgbm
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    draw = np.random.default_rng(4)
    x = draw.standard_normal((300, 5))
    trees = lightgbm.LGBMRegressor(n_estimators=20, num_leaves=7, verbose=-1).fit(x, x[:, 0] * x[:, 1])
    made = onnxmltools.convert_lightgbm(
        trees, initial_types=[("table", FloatTensorType([None, 5]))], target_opset=15, zipmap=False
    )
    (folder / EXPERT).write_bytes(made.SerializeToString())


def _spox(folder: Path) -> None:
    """What of `x` is kept: bool in; a float, a bool and an int64 out, all along one open axis."""
    import spox
    import spox.opset.ai.onnx.v19 as op

    x = spox.argument(spox.Tensor(np.float32, ("N", 3)))
    keep = spox.argument(spox.Tensor(np.bool_, ("N", 3)))
    kept = op.where(keep, x, op.const(np.float32(0)))
    axes = op.const(np.array([1]))
    count = op.reduce_sum(op.cast(keep, to=np.int64), axes, keepdims=False)
    outputs = {
        "total": op.reduce_sum(kept, axes, keepdims=False),
        "any": op.greater(count, op.const(np.int64(0))),
        "count": count,
    }
    (folder / EXPERT).write_bytes(spox.build({"x": x, "keep": keep}, outputs).SerializeToString())


def _onnxscript(folder: Path) -> None:
    """Tokens of any number pooled under a mask, by a function that the file itself defines; opset 21."""
    from wild_onnxscript import pooled

    (folder / EXPERT).write_bytes(pooled.to_model_proto().SerializeToString())


def _external(folder: Path) -> None:
    """20 MB of weights which, as the newer PyTorch exporters do, lie in a file of their own beside the graph."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(5)
    w1, w2 = (draw.standard_normal(shape).astype(np.float32) / 50 for shape in ((512, 5000), (5000, 500)))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"]),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("MatMul", ["t", "w2"], ["y"]),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 500])],
        [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save_model(model, folder / "wide.onnx", save_as_external_data=True, location="wide.weights")


def write_mixture(folder: Path) -> None:
    """A gate and three experts, all of scikit-learn: the gate gives a label beside its probabilities."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPRegressor

    draw = np.random.default_rng(6)
    x = draw.standard_normal((120, 4)).astype(np.float32)
    where = x[:, 0].argsort().argsort() * 3 // 120
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few rounds do not converge is no matter here
        experts = [
            MLPRegressor(hidden_layer_sizes=(8,), max_iter=5, random_state=i).fit(x[where == i], x[where == i, 1])
            for i in range(3)
        ]
        gate = LogisticRegression().fit(x, where)
    for index, expert in enumerate(experts):
        (folder / f"expert-{index}.onnx").write_bytes(to_onnx(expert, x[:1], target_opset=12).SerializeToString())
    made = to_onnx(gate, x[:1], target_opset=12, options={"zipmap": False})
    (folder / "gate.onnx").write_bytes(made.SerializeToString())


def _floats(name: str, *dims: int) -> Callable[[np.random.Generator], Arrays]:
    return lambda draw: {name: draw.standard_normal(dims).astype(np.float32)}


def _voice(draw: np.random.Generator) -> Arrays:
    return {
        "input": draw.standard_normal((1, 512)).astype(np.float32) / 4,
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000),
    }


WILD = (
    Wild("squeezenet", "Caffe2", _shipped("onnx", "backend/test/data/light/light_squeezenet.onnx"),
         _floats("data_0", 1, 3, 224, 224), False, 9),
    Wild("pipeline", "skl2onnx", _sklearn, lambda draw: _table(draw, 7), True, 9),
    Wild("ocr-lines", "Paddle2ONNX", _shipped("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
         _floats("x", 2, 3, 32, 64), True, 12),
    Wild("wide", "onnx.helper", _external, _floats("x", 5, 512), True, 13),
    Wild("trees", "onnxmltools", _lightgbm, _floats("table", 6, 5), True, 8),
    Wild("magika", "tf2onnx", _shipped("magika", "models/standard_v3_3/model.onnx"),
         lambda draw: {"bytes": draw.integers(0, 257, (2, 2048)).astype(np.int32)}, True, 15),
    Wild("silero", "PyTorch", _shipped("silero_vad", "data/silero_vad.onnx"), _voice, False, 16),
    Wild("kept", "spox", _spox,
         lambda draw: {"x": draw.standard_normal((4, 3)).astype(np.float32), "keep": draw.random((4, 3)) < 0.5},
         True, 19),
    Wild("pooled", "onnxscript", _onnxscript,
         lambda draw: {"tokens": draw.integers(0, 99, (3, 11)), "keep": draw.random((3, 11)) < 0.8}, True, 21),
)  # fmt: skip
