"""Trial runs of an expert in its killable child: arrays in, arrays out, by whichever of the honest ways to compute."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import InferenceError
from bmoe.protocol.tensors import Tensor

Arrays = dict[str, np.ndarray]
MEMORY_MB = 4096
RUN_TIMEOUT_S = 60.0
# Other orders of the same sums; what they differ by, boards may differ by.
HONEST_VARIANTS = ("extended", "basic", "plain", "threads")
# Where the memory of a child that is rid of its experts still grows: heap in pieces, a library's tables.
SPARE_MB = 8


class Lab:
    """Children for trial runs, one for each way to compute, kept from one expert to the next."""

    def __init__(self) -> None:
        self._runners: dict[str, Runner] = {}

    def by(self, variant: str = "") -> Runner:
        """The child that computes in this way, of `sessions.VARIANTS`."""
        if variant not in self._runners:
            self._runners[variant] = Runner(memory_mb=MEMORY_MB, variant=variant)
        return self._runners[variant]

    async def __aenter__(self) -> Lab:
        return self

    async def __aexit__(self, *_: object) -> None:
        for runner in self._runners.values():
            await runner.close()


@contextlib.asynccontextmanager
async def confined(memory_mb: int) -> AsyncIterator[Runner]:
    """A child of its own, which may use so much memory and no more."""
    async with Runner(memory_mb=memory_mb) as runner:
        await runner.start()
        yield runner


async def run(runner: Runner, file: ExpertFile, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """The expert's outputs by name, in its order. Raises what the runner raises."""
    tensors = [as_tensor(name, array) for name, array in inputs.items()]
    result = await runner.run(file, tensors, timeout_s=RUN_TIMEOUT_S)
    return {t.name: as_array(t) for t in result.outputs}


async def run_rows(runner: Runner, file: ExpertFile, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """The same, one row at a time, joined; a scalar output cannot be joined and raises InferenceError."""
    rows = len(next(iter(inputs.values())))
    parts = [await run(runner, file, {n: a[i : i + 1] for n, a in inputs.items()}) for i in range(rows)]
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise InferenceError(f"its outputs for single rows do not join to a batch: {error}") from None


async def memory_mb(file: ExpertFile, inputs: Mapping[str, np.ndarray]) -> int:
    """How much memory, in MB, the expert needs for these inputs: what its child's peak grew by, with a quarter to
    spare, and more until a child with no more than that can run it."""
    async with confined(MEMORY_MB) as runner:
        before = _peak_mb(runner)
        await run(runner, file, inputs)
        needed = int(1.25 * (_peak_mb(runner) - before)) + SPARE_MB
    while True:
        try:
            async with confined(needed) as runner:
                await run(runner, file, inputs)
            return needed
        except InferenceError:
            if needed >= MEMORY_MB:
                raise
            needed = min(MEMORY_MB, needed * 3 // 2)


def greatest_difference(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each output the largest |x - y|; infinite where shapes differ, or integers do."""
    return {name: _difference(first[name], second[name]) for name in first}


def _difference(x: np.ndarray, y: np.ndarray) -> float:
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if x.dtype.kind != "f":
        return 0.0 if np.array_equal(x, y) else float("inf")
    gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
    return float("inf") if np.isnan(gap).any() else float(gap.max(initial=0.0))


def as_tensor(name: str, array: np.ndarray) -> Tensor:
    """An array as it goes over the wire."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return Tensor(name, array.dtype.name, array.shape, little.tobytes())


def as_array(tensor: Tensor) -> np.ndarray:
    """And back."""
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.dims)


def _peak_mb(runner: Runner) -> float:
    status = Path(f"/proc/{runner.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def rows_of(inputs: Mapping[str, np.ndarray], count: int) -> Arrays:
    """The inputs repeated along axis 0 until they have `count` rows."""
    return {n: np.resize(a, (count, *a.shape[1:])) for n, a in inputs.items()}


def same_bytes(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    """Whether two runs gave the same, bit for bit."""
    return all(
        a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(first.values(), second.values(), strict=True)
    )


def not_finite(outputs: Mapping[str, np.ndarray]) -> Sequence[str]:
    """The outputs that hold a NaN or an infinity."""
    return [name for name, array in outputs.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
