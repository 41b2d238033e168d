"""Model files made to break whoever opens them: the child process ends at its bound, and the next task is served."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
from inference_helpers import MEMORY_MB, Store, assert_serves, tensor

from bmoe.inference.runner import Runner
from bmoe.protocol.errors import InferenceError, ModelError


def resident_mb(pid: int | None) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) >> 10


def nested_graphs(depth: int) -> bytes:
    """A Loop in a Loop in a Loop: parsers that recurse run out of stack."""
    body = models.graph([], [], [])
    for _ in range(depth):
        body = models.graph([models.node("Loop", ["", ""], ["y"], body=body)], [], [])
    return models.model(body)


def claimed(dims: list[int]) -> bytes:
    """An initializer that claims a shape and brings no data."""
    lie = models.fields(1, dims) + models.field(2, models.FLOAT) + models.field(8, "w")
    x, y = models.value("x", models.FLOAT, [2]), models.value("y", models.FLOAT, [2])
    return models.model(models.graph([models.node("Add", ["x", "w"], ["y"])], [x], [y], [lie]))


def constant(items: int) -> bytes:
    """A model of 100 bytes whose constant is folded into so many floats while it is loaded."""
    shape = models.tensor("s", np.array([items], np.int64))
    nodes = [
        models.node("ConstantOfShape", ["s"], ["w"], value=np.zeros(1, np.float32)), models.node("Add", ["w", "x"], ["y"])
    ]  # fmt: skip
    x, y = models.value("x", models.FLOAT, [1]), models.value("y", models.FLOAT, ["N"])
    return models.model(models.graph(nodes, [x], [y], [shape]))


MLP = models.mlp()
HOSTILE = {
    "graphs nested 5,000 deep": nested_graphs(5000),
    "an initializer that claims 2 GB": claimed([1 << 29]),
    "an initializer of 2^60 items": claimed([1 << 30, 1 << 30]),
    "an initializer of a negative shape": claimed([2**64 - 4]),
    "a constant that unfolds to 40 GB": constant(10**10),
    "a length that lies": MLP[:40] + b"\xff\xff\xff\xff\x7f" + MLP[45:],
    "half a model": MLP[: len(MLP) // 2],
    "a million empty nodes": models.model(models.field(1, b"") * 1_000_000),
    "another file of the machine": models.with_external_data("../../../../../../etc/passwd"),
    "an absolute path": models.with_external_data("/etc/passwd"),
    "the worker's own memory": models.with_external_data("/proc/self/mem"),
}


@pytest.mark.parametrize("story", HOSTILE)
async def test_a_hostile_model_is_refused_within_bounds_and_the_next_task_is_served(
    story: str, runner: Runner, store: Store
) -> None:
    before = time.monotonic()
    with pytest.raises((ModelError, InferenceError)) as refused:
        expert = store(HOSTILE[story])
        await runner.load(expert, timeout_s=5)
        await runner.run(expert, [tensor("x", np.zeros(2 if "file" in story else 1, np.float32))], timeout_s=5)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 800 and "root:" not in line
    assert time.monotonic() - before < 12
    await assert_serves(runner, store(MLP))
    assert resident_mb(runner.pid) < MEMORY_MB + 150 and resident_mb(os.getpid()) < 2000
