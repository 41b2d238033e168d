"""What the tests of inference share: tensors and models at hand, and a run that is certainly under way."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_models as models
import onnxruntime

from bmoe.inference import sessions
from bmoe.inference.runner import ExpertFile, Runner, RunResult
from bmoe.protocol.tensors import Tensor

MEMORY_MB = 128
FOREVER = np.array(10**15)
Store = Callable[[bytes], ExpertFile]


def put(folder: Path, data: bytes) -> ExpertFile:
    """Put a model's bytes into a file named by their digest."""
    digest = hashlib.sha256(data).digest()
    path = folder / f"{digest.hex()}.onnx"
    path.write_bytes(data)
    return ExpertFile(digest, path)


def tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, array.dtype.name, array.shape, array.tobytes())


def rows(count: int, columns: int = 4, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, columns), np.float32)


def slow_inputs(turns: np.ndarray = FOREVER) -> list[Tensor]:
    return [tensor("turns", turns), tensor("x", np.eye(128, dtype=np.float32))]


def in_process(data: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(data, sessions.session_options(), providers=sessions.PROVIDERS)
    return session.run(None, feeds)


async def assert_serves(runner: Runner, expert: ExpertFile) -> None:
    """The runner still gives the right answer of an `mlp()`."""
    x = rows(3, seed=9)
    result = await runner.run(expert, [tensor("x", x)], timeout_s=30)
    assert [out.data for out in result.outputs] == [a.tobytes() for a in in_process(models.mlp(), {"x": x})]


async def busy(runner: Runner, expert: ExpertFile) -> asyncio.Task[RunResult]:
    """A run without end, once the child is computing it: it spends processor time, which an idle one does not."""
    await runner.load(expert)
    before = cpu_seconds(runner.pid)
    task = asyncio.create_task(runner.run(expert, slow_inputs(), timeout_s=60))
    deadline = time.monotonic() + 20
    while cpu_seconds(runner.pid) < before + 0.05:
        assert not task.done() and time.monotonic() < deadline
        await asyncio.sleep(0.005)
    return task


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
