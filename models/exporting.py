"""From a trained mixture to a published model: ONNX files, calibrated epsilons, golden pairs, `model.json`.

Shared by the built-in models' training scripts, which say what theirs is in a `Source`. Needs torch and onnx.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper
from torch import nn

from bmoe.storage.manifest import FORMAT, MANIFEST_NAME, Expert, Golden, Model, TensorSpec, render_manifest
from bmoe.storage.origin import ORIGIN_NAME

OPSET = 17
GOLDEN_ROWS = 4
# The greatest x86-to-ARM difference measured on fp32 CNN outputs; the calibration below sees one processor only.
FOREIGN_DRIFT = 1.3e-6


@dataclass(frozen=True)
class Source:
    """What a model is: its one input (name, dtype, dims of a row), classes, and how its top_k experts are chosen."""

    name: str
    licence: str
    description: str
    labels: tuple[str, ...]
    top_k: int
    input: str
    dtype: str
    dims: tuple[int, ...]
    memory_mb: int


def export(
    source: Source, gate: nn.Module, experts: Sequence[nn.Module], calibration: np.ndarray, folder: Path, version: int
) -> Model:
    """Writes every file of the model into `folder`, the manifest last. `calibration`: real rows [N, *source.dims].

    `gate` and `experts` give logits; each is published with a softmax behind it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = len(source.labels)
    gate_part = _part("gate", source, gate, ("scores", len(experts)), calibration, folder)
    parts = tuple(
        _part(f"expert-{number}", source, body, ("probabilities", classes), calibration, folder)
        for number, body in enumerate(experts)
    )
    model = Model(
        format=FORMAT,
        name=source.name,
        version=version,
        licence=source.licence,
        description=source.description,
        top_k=source.top_k,
        combine="weighted_sum",
        labels=source.labels,
        gate=gate_part,
        experts=parts,
    )
    (folder / MANIFEST_NAME).write_bytes(render_manifest(model))
    return model


def write_origin(
    source: Source, folder: Path, data: Mapping[str, str], seed: int, parameters: Mapping[str, object]
) -> None:
    """Writes origin.json, what this run knows of where the model comes from; `bmoe release publish` states it.

    `data`: SHA-256 by name. Times are left out, so that equal runs write equal files.
    """
    environment = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "onnx", "onnxruntime")}
    facts = {
        "data": dict(data),
        "code": {"uri": f"models/{source.name}/train.py", "commit": _commit()},
        "seeds": {"torch": seed},
        "environment": {**environment, "python": platform.python_version(), "machine": platform.machine()},
        "parameters": dict(parameters),
    }
    (folder / ORIGIN_NAME).write_text(json.dumps(facts, indent=1) + "\n")


def _commit() -> str:
    """The commit of this checkout, with `-dirty` behind it where files differ; nothing outside a checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _part(
    name: str, source: Source, body: nn.Module, output: tuple[str, int], calibration: np.ndarray, folder: Path
) -> Expert:
    network = nn.Sequential(body, nn.Softmax(dim=1)).eval()
    graph = _to_onnx(network, source, output[0])
    drift = _drift(graph, network, calibration)
    epsilon = _round_up(4 * max(drift, FOREIGN_DRIFT))
    cheat = np.abs(_run(_half_weights(graph), calibration) - _run(graph, calibration)).max(axis=1)
    print(
        f"{name}: {len(graph)} bytes, drift {drift:.1e}, epsilon {epsilon:.0e}, fp16 weights differ by up to"
        f" {cheat.max():.1e} and by more than 2 epsilon on {np.mean(cheat > 2 * epsilon):.0%} of rows"
    )
    rows = calibration[:GOLDEN_ROWS]
    golden = io.BytesIO()
    np.savez(golden, **{f"in.{source.input}": rows, f"out.{output[0]}": _run(graph, rows)})
    return Expert(
        name=name,
        **_write(folder / f"{name}.onnx", graph),
        opset=OPSET,
        memory_mb=source.memory_mb,
        batch=True,
        inputs=(TensorSpec(source.input, source.dtype, (None, *source.dims)),),
        outputs=(TensorSpec(output[0], "float32", (None, output[1]), epsilon),),
        licence=source.licence,
        golden=Golden(**_write(folder / f"golden-{name}.npz", golden.getvalue())),
    )


def _write(path: Path, data: bytes) -> dict[str, object]:
    path.write_bytes(data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _to_onnx(network: nn.Module, source: Source, output: str) -> bytes:
    """One file without external data; bare of producer names, so that equal weights give equal bytes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated, but needs no further package and gives twelve plain nodes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(2, *source.dims, dtype=getattr(torch, source.dtype)),),
            stream,
            input_names=[source.input],
            output_names=[output],
            dynamic_axes={source.input: {0: "rows"}, output: {0: "rows"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(stream.getvalue())
    model.producer_name = model.producer_version = model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _run(graph: bytes, rows: np.ndarray, level: str = "ENABLE_ALL", batch: int = 64, threads: int = 1) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    blocks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return np.concatenate([session.run(None, {name: block})[0] for block in blocks])


def _drift(graph: bytes, network: nn.Module, rows: np.ndarray) -> float:
    """Greatest absolute difference between honest ways to compute the same graph on this processor."""
    base = _run(graph, rows)
    given = torch.from_numpy(rows)
    with torch.no_grad():
        others = [network(given).numpy()]
        others.append(network.double()(given.double() if given.is_floating_point() else given).numpy())
        network.float()
    for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"):
        others += [_run(graph, rows, level, batch, threads) for batch, threads in ((1, 1), (7, 1), (512, 2))]
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
