"""The measure of the demonstration: the same model over the same windows in plain onnxruntime, nothing of ours between.

A process of its own: prints one JSON object {"rows", "correct"}. The gate's rule and the sum are written out here
again, in float64, so that a fault in the coordinator's own cannot hide in both figures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.demo.windows import INPUT, MODEL, held_out
from bmoe.protocol.errors import BmoeError
from bmoe.storage.packaged import packaged


def probabilities(folder: Path, windows: np.ndarray) -> np.ndarray:
    """float64 [N, classes]: the top_k experts by gate score (ties: lower index), weighted by their scores."""
    manifest = json.loads((folder / "model.json").read_bytes())
    top_k = manifest["top_k"]
    scores = _run(folder / manifest["gate"]["file"], windows)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, chosen, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    by_expert = np.stack([_run(folder / expert["file"], windows) for expert in manifest["experts"]])
    rows = np.arange(len(windows))
    return sum(weights[:, k, None] * by_expert[chosen[:, k], rows] for k in range(top_k))


def _run(path: Path, windows: np.ndarray) -> np.ndarray:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {INPUT: windows})[0].astype(np.float64)


def main() -> int:
    """Measure and print."""
    try:
        windows, labels = held_out()
        found = probabilities(packaged("models", MODEL), windows).argmax(axis=1)
    except BmoeError as error:
        print(f"clean: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"rows": len(labels), "correct": int((found == labels).sum())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
