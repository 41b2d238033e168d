"""From a trained mixture to a published model: ONNX files, calibrated epsilons, golden pairs, `model.json`."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import numpy as np
import onnx
import onnxruntime as ort
import torch
from data import AXES, LABELS, WINDOW
from network import EXPERTS, TOP_K, Mixture
from onnx import numpy_helper
from torch import nn

from bmoe.storage.manifest import FORMAT, MANIFEST_NAME, Expert, Golden, Model, TensorSpec, render_manifest

OPSET = 17
GOLDEN_ROWS = 4
LICENCE = "BSD-3-Clause"
# The first session of a process took 10 MB of resident memory at 256 rows, each further one under 0.1 MB.
MEMORY_MB = 16
# The greatest x86-to-ARM difference measured on fp32 CNN outputs; the calibration below sees one processor only.
FOREIGN_DRIFT = 1.3e-6
DESCRIPTION = (
    "Which of seven shoulder exercises a wrist does: 2 seconds of a smartwatch's accelerometer (g) and gyroscope"
    " (rad/s), 6 axes at 50 Hz, raw. Top 2 of 6 one-dimensional CNNs."
)


def export(mixture: Mixture, calibration: np.ndarray, folder: Path, version: int) -> Model:
    """Writes every file of the model into `folder`, the manifest last. `calibration`: windows float32 [N, 6, 100]."""
    folder.mkdir(parents=True, exist_ok=True)
    mixture.eval()
    gate = _part("gate", mixture.gate, ("scores", EXPERTS), calibration, folder)
    experts = tuple(
        _part(f"expert-{number}", body, ("probabilities", len(LABELS)), calibration, folder)
        for number, body in enumerate(mixture.experts)
    )
    model = Model(
        format=FORMAT,
        name="wearable",
        version=version,
        licence=LICENCE,
        description=DESCRIPTION,
        top_k=TOP_K,
        combine="weighted_sum",
        labels=LABELS,
        gate=gate,
        experts=experts,
    )
    (folder / MANIFEST_NAME).write_bytes(render_manifest(model))
    return model


def _part(name: str, body: nn.Module, output: tuple[str, int], calibration: np.ndarray, folder: Path) -> Expert:
    network = nn.Sequential(body, nn.Softmax(dim=1)).eval()
    graph = _to_onnx(network, output[0])
    drift = _drift(graph, network, calibration)
    epsilon = _round_up(4 * max(drift, FOREIGN_DRIFT))
    cheat = np.abs(_run(_half_weights(graph), calibration) - _run(graph, calibration)).max(axis=1)
    print(
        f"{name}: {len(graph)} bytes, drift {drift:.1e}, epsilon {epsilon:.0e}, fp16 weights differ by up to"
        f" {cheat.max():.1e} and by more than 2 epsilon on {np.mean(cheat > 2 * epsilon):.0%} of windows"
    )
    rows = calibration[:GOLDEN_ROWS]
    golden = io.BytesIO()
    np.savez(golden, **{"in.window": rows, f"out.{output[0]}": _run(graph, rows)})
    return Expert(
        name=name,
        **_write(folder / f"{name}.onnx", graph),
        opset=OPSET,
        memory_mb=MEMORY_MB,
        batch=True,
        inputs=(TensorSpec("window", "float32", (None, AXES, WINDOW)),),
        outputs=(TensorSpec(output[0], "float32", (None, output[1]), epsilon),),
        licence=LICENCE,
        golden=Golden(**_write(folder / f"golden-{name}.npz", golden.getvalue())),
    )


def _write(path: Path, data: bytes) -> dict[str, object]:
    path.write_bytes(data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _to_onnx(network: nn.Module, output: str) -> bytes:
    """One file without external data; bare of producer names, so that equal weights give equal bytes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated, but needs no further package and gives twelve plain nodes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(2, AXES, WINDOW),),
            stream,
            input_names=["window"],
            output_names=[output],
            dynamic_axes={"window": {0: "rows"}, output: {0: "rows"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(stream.getvalue())
    model.producer_name = model.producer_version = model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _run(graph: bytes, windows: np.ndarray, level: str = "ENABLE_ALL", batch: int = 64, threads: int = 1) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    blocks = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    return np.concatenate([session.run(None, {"window": block})[0] for block in blocks])


def _drift(graph: bytes, network: nn.Module, windows: np.ndarray) -> float:
    """Greatest absolute difference between honest ways to compute the same graph on this processor."""
    base = _run(graph, windows)
    with torch.no_grad():
        others = [network(torch.from_numpy(windows)).numpy()]
        others.append(network.double()(torch.from_numpy(windows).double()).numpy())
        network.float()
    for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"):
        others += [_run(graph, windows, level, batch, threads) for batch, threads in ((1, 1), (7, 1), (512, 2))]
    return float(max(np.abs(other - base).max() for other in others))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten, so that an epsilon does not change with every retraining."""
    power = math.floor(math.log10(value))
    return next(float(f"{step}e{power}") for step in (1, 2, 5, 10) if float(f"{step}e{power}") >= value)


def _half_weights(graph: bytes) -> bytes:
    """The cheat to be caught: the same graph with its weights rounded to fp16."""
    model = onnx.load_from_string(graph)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16).astype(np.float32), weight.name))
    return model.SerializeToString()
