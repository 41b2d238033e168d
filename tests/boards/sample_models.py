"""The models of the drift table, made anew by each run with fixed seeds: fp32, and the same quantised to int8 (QDQ)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

OPSET, IR_VERSION = 17, 8
ROWS = 64
INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Sample:
    """One model: its name, how it is written, the shape of a row, and whether it is quantised."""

    name: str
    title: str
    write: Callable[[np.random.Generator], onnx.ModelProto]
    row: tuple[int, ...]
    int8: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        """64 rows, float32, normal."""
        return {INPUT: np.random.default_rng(11).standard_normal((ROWS, *self.row)).astype(np.float32)}


class Layers:
    """A graph, layer by layer; weights are drawn as they are needed."""

    def __init__(self, draw: np.random.Generator, row: Sequence[int]) -> None:
        self.draw, self.row = draw, tuple(row)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = INPUT

    def weight(self, *shape: int, scale: float = 0.0) -> str:
        """A new float32 constant, scaled by its fan-in where nothing else is said."""
        name = f"w{len(self.weights)}"
        spread = scale or 1.0 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else shape[0])
        values = (self.draw.standard_normal(shape) * spread).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> Layers:
        """Apply an operator to what the last one gave, or to `inputs` where "" stands for that."""
        target = f"t{len(self.nodes)}"
        given = [name or self.last for name in inputs] or [self.last]
        self.nodes.append(helper.make_node(op, given, [target], name=target, **attributes))
        self.last = target
        return self

    def model(self, columns: int) -> onnx.ModelProto:
        """Finished: x float32[N, *row] -> y float32[N, columns]."""
        self.nodes[-1].output[0] = OUTPUT
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *self.row])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", columns])],
            self.weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(made)
        return made


def mlp(draw: np.random.Generator) -> onnx.ModelProto:
    """32-256-256-10, ReLU between."""
    layers = Layers(draw, (32,))
    for width, wider in ((32, 256), (256, 256)):
        layers.add("Gemm", "", layers.weight(width, wider), layers.weight(wider, scale=0.1)).add("Relu")
    return layers.add("Gemm", "", layers.weight(256, 10), layers.weight(10, scale=0.1)).model(10)


def cnn(draw: np.random.Generator) -> onnx.ModelProto:
    """3x16x16: a 3x3 convolution, a depthwise one, a 1x1, global average pooling, ten scores."""
    layers = Layers(draw, (3, 16, 16))
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    layers.add("Conv", "", layers.weight(16, 3, 3, 3), layers.weight(16, scale=0.1), **same).add("Relu")
    layers.add("Conv", "", layers.weight(16, 1, 3, 3), layers.weight(16, scale=0.1), group=16, **same).add("Relu")
    layers.add("Conv", "", layers.weight(32, 16, 1, 1), layers.weight(32, scale=0.1), kernel_shape=[1, 1]).add("Relu")
    layers.add("GlobalAveragePool").add("Flatten", axis=1)
    return layers.add("Gemm", "", layers.weight(32, 10), layers.weight(10, scale=0.1)).model(10)


def transcendental(draw: np.random.Generator) -> onnx.ModelProto:
    """Layer normalisation, then GELU by erf, tanh, sigmoid and softmax, with dense layers between."""
    layers = Layers(draw, (32,))
    layers.add("LayerNormalization", "", layers.weight(32, scale=1.0), layers.weight(32, scale=0.1), axis=-1)
    layers.add("Gemm", "", layers.weight(32, 64), layers.weight(64, scale=0.1))
    dense, half, one = layers.last, layers.weight(1, scale=0.5), layers.weight(1, scale=1.0)
    layers.add("Mul", "", half).add("Erf").add("Add", "", one).add("Mul", "", dense)
    layers.add("Gemm", "", layers.weight(64, 64), layers.weight(64, scale=0.1)).add("Tanh")
    layers.add("Gemm", "", layers.weight(64, 64), layers.weight(64, scale=0.1)).add("Sigmoid")
    return layers.add("Gemm", "", layers.weight(64, 10), layers.weight(10, scale=0.1)).add("Softmax", axis=1).model(10)


SAMPLES = (
    Sample("mlp-fp32", "MLP 32-256-256-10, fp32", mlp, (32,)),
    Sample("cnn-fp32", "CNN 3x16x16, fp32", cnn, (3, 16, 16)),
    Sample("transcendental-fp32", "layer norm, GELU, tanh, sigmoid, softmax, fp32", transcendental, (32,)),
    Sample("mlp-int8", "the MLP, int8 (QDQ, per channel)", mlp, (32,), int8=True),
    Sample("cnn-int8", "the CNN, int8 (QDQ, per channel)", cnn, (3, 16, 16), int8=True),
)


class _Rows(CalibrationDataReader):
    """The rows that quantisation takes its ranges from."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self._left = iter([inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def write(sample: Sample, folder: Path) -> Path:
    """Write a sample's ONNX file; the same bytes in every run of one version of onnxruntime."""
    path = folder / f"{sample.name}.onnx"
    plain = folder / f"{sample.name}.plain"
    onnx.save(sample.write(np.random.default_rng(7)), path if not sample.int8 else plain)
    if sample.int8:
        shaped = folder / f"{sample.name}.shaped"
        quant_pre_process(plain, shaped, skip_symbolic_shape=True)
        quantize_static(
            shaped, path, _Rows(sample.inputs()), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        for scrap in (plain, shaped):
            scrap.unlink()
    return path
