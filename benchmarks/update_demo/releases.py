"""The releases of the demonstration, made from the built-in model: an early one, the better one, and three broken ones.

Each is a folder with a model.json that says the truth about its files, for a release whose files are not what it says
never gets as far as a rollout. What is broken is what only running it can show.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.demo.windows import INPUT, MODEL, OUTPUT
from bmoe.storage.golden import read_golden, write_golden
from bmoe.storage.packaged import packaged

# How much the early version's weights are off, in standard deviations of each: it has seen less training.
EARLY_NOISE = 0.6
# A board takes about a second for so many products of matrices of this size.
SLOW_SIZE, SLOW_PRODUCTS = 512, 36
SLOW_MEMORY_MB = 64

Change = Callable[[onnx.ModelProto], onnx.ModelProto]


def early(root: Path, seed: int) -> Path:
    """Version 1: the built-in experts with noise on their weights."""
    dice = np.random.default_rng(seed)
    return _made(root / "early", 1, range(6), lambda model: _noisy(model, dice))


def better(root: Path) -> Path:
    """Version 2: the built-in experts as they were trained."""
    return _made(root / "better", 2, (), lambda model: model)


def false_golden(root: Path) -> Path:
    """Version 3: an expert that does not reproduce the golden pair it was published with."""
    folder = _made(root / "false-golden", 3, (0,), lambda model: _marked(model, "3"))
    manifest = _read(folder)
    part = manifest["experts"][0]
    inputs, outputs = read_golden((folder / part["golden"]["file"]).read_bytes())
    _put_golden(folder, part, inputs, {OUTPUT: outputs[OUTPUT][:, ::-1].copy()})
    _write(folder, manifest)
    return folder


def slow(root: Path) -> Path:
    """Version 4: experts that give the right values, a thousand times slower."""
    return _made(root / "slow", 4, range(6), _slowed, memory_mb=SLOW_MEMORY_MB)


def wrong(root: Path) -> Path:
    """Version 5: experts whose golden pairs are reproduced, and whose labels are all off by one."""
    return _made(root / "wrong", 5, range(6), _rolled)


BROKEN = {"false golden pair": false_golden, "slow": slow, "wrong outputs": wrong}


def _made(folder: Path, version: int, changed: Any, change: Change, memory_mb: int = 0) -> Path:
    shutil.copytree(packaged("models", MODEL), folder)
    manifest = _read(folder)
    manifest["version"] = version
    for index in changed:
        part = manifest["experts"][index]
        path = folder / part["file"]
        onnx.save(change(onnx.load(path)), path)
        part |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        part["memory_mb"] = max(part["memory_mb"], memory_mb)
        inputs, _ = read_golden((folder / part["golden"]["file"]).read_bytes())
        _put_golden(folder, part, inputs, {OUTPUT: _run(path, inputs[INPUT])})
    _write(folder, manifest)
    return folder


def _noisy(model: onnx.ModelProto, dice: np.random.Generator) -> onnx.ModelProto:
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim > 1:
            noise = EARLY_NOISE * array.std() * dice.standard_normal(array.shape)
            weight.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), weight.name))
    return _marked(model, "early")


def _marked(model: onnx.ModelProto, mark: str) -> onnx.ModelProto:
    """The same function in another file."""
    model.doc_string = mark
    return model


def _rolled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The probabilities one class further on."""
    graph, given = model.graph, _behind(model, "straight")
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = numpy_helper.from_array(np.roll(np.arange(classes, dtype=np.int64), 1), "roll_order")
    graph.initializer.append(order)
    graph.node.append(helper.make_node("Gather", [given, "roll_order"], [OUTPUT], axis=1))
    return model


def _slowed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The output plus nought times a long product that depends on the input, so that nothing can be left out."""
    graph, given = model.graph, _behind(model, "prompt")
    for name, value in (("slow_shape", [SLOW_SIZE, SLOW_SIZE]),):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for name, number in (("slow_scale", 1 / SLOW_SIZE), ("slow_nought", 0.0)):
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    nodes = [
        helper.make_node("ReduceMean", [INPUT], ["slow_mean"], keepdims=0),
        helper.make_node("Mul", ["slow_mean", "slow_nought"], ["slow_zero"]),
        helper.make_node("Add", ["slow_zero", "slow_scale"], ["slow_value"]),
        helper.make_node("Expand", ["slow_value", "slow_shape"], ["slow_0"]),
    ]
    for i in range(SLOW_PRODUCTS):
        nodes.append(helper.make_node("MatMul", [f"slow_{i}", "slow_0"], [f"slow_{i + 1}"]))
    nodes += [
        helper.make_node("ReduceMean", [f"slow_{SLOW_PRODUCTS}"], ["slow_sum"], keepdims=0),
        helper.make_node("Mul", ["slow_sum", "slow_nought"], ["slow_nothing"]),
        helper.make_node("Add", [given, "slow_nothing"], [OUTPUT]),
    ]
    graph.node.extend(nodes)
    return model


def _behind(model: onnx.ModelProto, name: str) -> str:
    """Rename what gives the output, so that something can stand behind it; its new name."""
    for node in model.graph.node:
        for i, output in enumerate(node.output):
            if output == OUTPUT:
                node.output[i] = name
        for i, given in enumerate(node.input):
            if given == OUTPUT:
                node.input[i] = name
    return name


def _put_golden(folder: Path, part: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    data = write_golden(inputs, outputs)
    (folder / part["golden"]["file"]).write_bytes(data)
    part["golden"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _run(path: Path, windows: np.ndarray) -> np.ndarray:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {INPUT: windows})[0])


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model.json").read_bytes()))


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "model.json").write_text(json.dumps(manifest, indent=1) + "\n")
