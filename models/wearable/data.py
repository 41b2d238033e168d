"""Smartwatch windows of the wearable model: the recordings of `seglearn`, cut, labelled and split by wearer.

The recordings (arXiv 1802.01489, BSD licence) are a pickle inside the package `seglearn`. That package is never
imported, and the pickle is opened only if its SHA-256 is the one this model was trained on, by an unpickler that
admits nothing but numpy arrays. Standard library and numpy alone, so that a demonstration can load this file by path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, STRIDE, AXES, RATE_HZ = 100, 25, 6, 50
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
# One fixed pair of wearers whom training never sees; MODEL.md gives all five pairs and says why this one.
HELD_OUT = (7, 8)
FOLDS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
FILE_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All windows: (float32 [9276, 6, 100] in the units of the watch, labels int64 [9276], wearer 1..10 int64 [9276]).

    Raises FileNotFoundError if `seglearn` is not installed, ValueError if its recordings are not the known ones.
    """
    recordings = _recordings()
    cut, labels, wearers = [], [], []
    for series, label, wearer in zip(recordings["X"], recordings["y"], recordings["subject"], strict=True):
        views = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=0)[::STRIDE]
        cut.append(np.ascontiguousarray(views, np.float32))
        labels += [int(label)] * len(views)
        wearers += [int(wearer)] * len(views)
    return np.concatenate(cut), np.array(labels, np.int64), np.array(wearers, np.int64)


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Windows float32 [N, 6, 100] and labels int64 [N] (index into LABELS) of the wearers training never saw."""
    x, y, wearers = windows()
    rows = np.isin(wearers, HELD_OUT)
    return x[rows], y[rows]


def _recordings() -> dict[str, Any]:
    raw = _recordings_file().read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != FILE_SHA256:
        raise ValueError(f"watch_dataset.npy: expected SHA-256 {FILE_SHA256}, found {digest}; install seglearn 1.2.5")
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("watch_dataset.npy: expected .npy format 1.0")
    np.lib.format.read_array_header_1_0(stream)
    recordings = _ArraysOnly(stream, encoding="latin1").load().item()
    if tuple(recordings["y_labels"]) != LABELS:
        raise ValueError(f"watch_dataset.npy: expected labels {LABELS}, found {recordings['y_labels']}")
    return recordings


def _recordings_file() -> Path:
    for installed in importlib.metadata.distributions(name="seglearn"):
        path = Path(str(installed.locate_file("seglearn/data/watch_dataset.npy")))
        if path.is_file():
            return path
    raise FileNotFoundError("the recordings are not installed: `pip install --no-deps seglearn==1.2.5`")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected latin1 bytes, found {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Admits the four names a pickled numpy array needs, so a planted pickle can run nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Admit what numpy arrays are made of; raises pickle.UnpicklingError for all else."""
        known = {
            # Taken from a live array: the module has another name in numpy 1 than in numpy 2.
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"expected only numpy arrays, found {module}.{name}")
        return known[module, name]
