"""(a): the same model in plain onnxruntime in this process; gate, the experts it activates, and their combination.

One thread, as every process of the fleet has. It does the work that a request causes and nothing else, so it is the
ceiling; it also says whether what the fleet answered is right.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class InProcess:
    """A mixture-of-experts model, or one expert without a gate: `answer` is one request."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "model.json").read_bytes())
        self._top_k = manifest["top_k"]
        self._input = manifest["experts"][0]["inputs"][0]["name"]
        self._gate = _session(folder / manifest["gate"]["file"]) if manifest["gate"] else None
        self._experts = [_session(folder / expert["file"]) for expert in manifest["experts"]]

    def answer(self, windows: np.ndarray) -> np.ndarray:
        """float32 [rows, classes] for float32 [rows, ...]: each expert runs once, over the rows that activate it."""
        if self._gate is None:
            return self._experts[0].run(None, {self._input: windows})[0]
        scores = self._gate.run(None, {self._input: windows})[0].astype(np.float64)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : self._top_k]
        weights = np.take_along_axis(scores, chosen, axis=1)
        weights /= weights.sum(axis=1, keepdims=True)
        total: np.ndarray | None = None
        for index in np.unique(chosen):
            rows, places = np.nonzero(chosen == index)
            values = self._experts[index].run(None, {self._input: windows[rows]})[0]
            if total is None:
                total = np.zeros((len(windows), *values.shape[1:]), np.float64)
            total[rows] += weights[rows, places][:, None] * values
        assert total is not None
        return total.astype(np.float32)


def run_in_process(model: InProcess, batches: list[np.ndarray], seconds: float) -> list[float]:
    """Latencies in milliseconds of answering `batches` in turn, one after another, for `seconds`."""
    latencies, index = [], 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        model.answer(batches[index % len(batches)])
        latencies.append(1000 * (time.perf_counter() - began))
        index += 1
    return latencies


def _session(path: Path):  # type: ignore[no-untyped-def]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
