"""ONNX files run by the worker that agents run them with, on this machine or on an emulated board."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import InputError
from coordinator.models import trial
from coordinator.models.trial import Arrays

MEMORY_MB = 4096
RUN_WITHIN_S = 600.0


def compute(python: str, jobs: Sequence[tuple[Path, Mapping[str, np.ndarray]]], *, variant: str = "") -> list[Arrays]:
    """The outputs of ONNX files for inputs by name, by the worker of this interpreter, "" for ours. Raises BmoeError.

    `variant`: another way to compute, of `sessions.VARIANTS`.
    """
    results: list[Arrays] = []
    faults: list[BaseException] = []

    def work() -> None:
        try:
            results.extend(asyncio.run(_compute(python, jobs, variant)))
        except BaseException as error:
            faults.append(error)

    # For a caller whose own event loop may be running; and whoever interrupts it need not wait for the emulated board.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return results


async def _compute(python: str, jobs: Sequence[tuple[Path, Mapping[str, np.ndarray]]], variant: str) -> list[Arrays]:
    results = []
    async with Runner(memory_mb=MEMORY_MB, python=python, variant=variant) as runner:
        for path, inputs in jobs:
            try:
                file = ExpertFile(hashlib.sha256(path.read_bytes()).digest(), path.resolve())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            tensors = [trial.as_tensor(name, array) for name, array in inputs.items()]
            await runner.load(file, timeout_s=RUN_WITHIN_S)
            done = await runner.run(file, tensors, timeout_s=RUN_WITHIN_S)
            results.append({tensor.name: trial.as_array(tensor) for tensor in done.outputs})
    return results
