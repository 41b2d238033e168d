"""Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 x 28, ten classes (arXiv 1708.07747, MIT licence).

The files are those of Debian's package `dataset-fashion-mnist` (`make data` fetches it without root), or lie in the
folder that BMOE_DATA names. Each is taken only if its SHA-256 is the known one. Standard library and numpy alone.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np

SIDE = 28
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
FOLDERS = (".data/usr/share/datasets/fashion-mnist", "/usr/share/datasets/fashion-mnist")
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def training() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [60000, 28, 28] and labels int64 [60000]; raises FileNotFoundError or ValueError as `read` does."""
    return _pictures("train-images-idx3-ubyte.gz"), _labels("train-labels-idx1-ubyte.gz")


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [10000, 28, 28] and labels int64 [10000] that training never saw."""
    return _pictures("t10k-images-idx3-ubyte.gz"), _labels("t10k-labels-idx1-ubyte.gz")


def read(name: str) -> bytes:
    """One file's content; raises FileNotFoundError saying how to get it, ValueError when it is another file."""
    given = os.environ.get("BMOE_DATA")
    root = Path(__file__).resolve().parents[2]
    for folder in [given] if given else [root / FOLDERS[0], FOLDERS[1]]:
        path = Path(folder) / name
        if path.is_file():
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            if digest != FILES[name]:
                raise ValueError(f"{path}: expected SHA-256 {FILES[name]}, found {digest}")
            return gzip.decompress(raw)
    raise FileNotFoundError(f"{name} is not here: run `make data`, or name the folder that holds it in BMOE_DATA")


def _pictures(name: str) -> np.ndarray:
    return np.frombuffer(read(name), np.uint8, offset=16).reshape(-1, SIDE, SIDE)


def _labels(name: str) -> np.ndarray:
    return np.frombuffer(read(name), np.uint8, offset=8).astype(np.int64)
