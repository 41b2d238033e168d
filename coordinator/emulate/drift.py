"""How far an emulated board's outputs are from this machine's: pure, arrays in, figures out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drift:
    """One output on a board against the same on this machine.

    `max_abs`: the largest |x - y|, infinite where shapes or dtypes differ or one side is not finite; `of_range`: the
    same over the range of this machine's values, 0 included; `argmax`: the share of rows whose largest value is at the
    same place.
    """

    output: str
    equal: bool
    max_abs: float
    of_range: float
    argmax: float


def compare(here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> list[Drift]:
    """One row an output."""
    return [_compare(name, array, there[name]) for name, array in here.items()]


def _compare(name: str, x: np.ndarray, y: np.ndarray) -> Drift:
    if x.shape != y.shape or x.dtype != y.dtype:
        return Drift(name, False, float("inf"), float("inf"), 0.0)
    equal = x.tobytes() == y.tobytes()
    a, b = x.astype(np.float64), y.astype(np.float64)
    gap = float(np.abs(a - b).max(initial=0.0)) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")
    gap = 0.0 if equal else gap
    spread = float(a.max(initial=0.0) - a.min(initial=0.0)) or 1.0
    agree = 1.0
    if x.ndim > 1 and x.shape[-1] > 1 and x.size:
        agree = float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
    return Drift(name, equal, gap, gap / spread if 0.0 < gap < float("inf") else gap, agree)
