"""How far two honest outputs may differ: measured on this machine, and for other processors assumed and said."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bmoe.inference.runner import ExpertFile
from bmoe.storage.onnx_file import OnnxFile
from coordinator.models import trial
from coordinator.models.trial import Arrays, Lab

FACTOR = 4
# x86 against ARM, fp32: at most 1.3e-6 was measured on outputs of size 1, which is 11 units in the last place.
FOREIGN_ULPS = 11
_PRECISION = ("float16", "float32", "float64")


async def drift(lab: Lab, file: ExpertFile, inputs: Arrays, outputs: Arrays, batch: bool) -> dict[str, float]:
    """The greatest difference of each output between honest ways to compute it on this processor."""
    found = dict.fromkeys(outputs, 0.0)
    for variant in trial.HONEST_VARIANTS:
        _raise_to(found, outputs, await trial.run(lab.by(variant), file, inputs))
    if batch:
        _raise_to(found, outputs, await trial.run_rows(lab.by(), file, inputs))
    return found


def epsilons(found: OnnxFile, outputs: Arrays, drift: Mapping[str, float]) -> dict[str, float]:
    """An absolute tolerance for each output: four times the drift, seen or assumed; 0 for integers."""
    return {
        name: rounded_up(FACTOR * max(drift[name], foreign_drift(found, array))) if array.dtype.kind == "f" else 0.0
        for name, array in outputs.items()
    }


def foreign_drift(found: OnnxFile, output: np.ndarray) -> float:
    """The drift assumed between processors: as measured for fp32, scaled to the coarsest floats in the graph."""
    coarsest = next(name for name in _PRECISION if name in found.dtypes or name == output.dtype.name)
    return FOREIGN_ULPS * float(np.finfo(coarsest).eps) * scale(output)


def explained(found: OnnxFile, name: str, output: np.ndarray, drift: float, epsilon: float) -> str:
    """One line on an output's tolerance: what was seen, what was assumed."""
    if output.dtype.kind != "f":
        floats = ", and where it comes of float sums a tie may fall otherwise on another processor"
        more = floats if found.dtypes & set(_PRECISION) else ""
        return f"output {name!r} is {output.dtype.name}: must be equal on all boards{more}"
    assumed = foreign_drift(found, output)
    return (
        f"output {name!r}: epsilon {epsilon:g} = {FACTOR} x the greater of {drift:.1e} seen here and {assumed:.1e}"
        f" assumed between processors, for values up to {scale(output):.3g}"
    )


def scale(output: np.ndarray) -> float:
    """How large the values are, never less than 1."""
    return max(1.0, float(np.abs(output.astype(np.float64)).max(initial=0.0)))


def rounded_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten, so that an epsilon does not change with every retraining."""
    power = math.floor(math.log10(value))
    return next(float(f"{step}e{power}") for step in (1, 2, 5, 10) if float(f"{step}e{power}") >= value)


def _raise_to(found: dict[str, float], outputs: Arrays, other: Arrays) -> None:
    for name, gap in trial.greatest_difference(outputs, other).items():
        if outputs[name].dtype.kind == "f":
            found[name] = max(found[name], gap)
