"""The wearable mixture as a published model: what it is, handed to the export that all built-in models share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data import AXES, LABELS, WINDOW
from network import TOP_K, Mixture

from bmoe.storage.manifest import Model
from models import exporting

SOURCE = exporting.Source(
    name="wearable",
    licence="BSD-3-Clause",
    description=(
        "Which of seven shoulder exercises a wrist does: 2 seconds of a smartwatch's accelerometer (g) and gyroscope"
        " (rad/s), 6 axes at 50 Hz, raw. Top 2 of 6 one-dimensional CNNs."
    ),
    labels=LABELS,
    top_k=TOP_K,
    input="window",
    dtype="float32",
    dims=(AXES, WINDOW),
    memory_mb=16,  # the first session of a process took 10 MB at 256 rows, each further one under 0.1 MB
)


def export(mixture: Mixture, calibration: np.ndarray, folder: Path, version: int) -> Model:
    """Writes every file of the model into `folder`. `calibration`: windows float32 [N, 6, 100]."""
    mixture.eval()
    return exporting.export(SOURCE, mixture.gate, list(mixture.experts), calibration, folder, version)
