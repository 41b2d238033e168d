"""Model files made to hurt whoever opens them: the child refuses or dies at its bound, and the next task is served."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
from inference_helpers import MEMORY_MB, Store, assert_serves, tensor
from onnx_models import BOOL, FLOAT, INT64, field, fields, graph, model, node, value, varint

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import InferenceError, ModelError

X = tensor("x", np.zeros(2, np.float32))
OURS_MB = 48  # what this process may grow by while its child is being hurt


def claimed_tensor(name: str, dims: tuple[int, ...], raw: bytes = b"") -> bytes:
    """A float32 initializer that says it has these dims, and holds `raw`."""
    return fields(1, dims) + field(2, FLOAT) + field(8, name) + field(9, raw)


def adding(initializer: bytes) -> bytes:
    """y = x + w with this w."""
    return model(
        graph([node("Add", ["x", "w"], ["y"])], [value("x", FLOAT, ["N"])], [value("y", FLOAT, ["M"])], [initializer])
    )


def of_nodes(*nodes: bytes) -> bytes:
    """x -> y, float32 of any length, by these nodes."""
    return model(graph(nodes, [value("x", FLOAT, ["N"])], [value("y", FLOAT, ["M"])]))


def nested(depth: int) -> bytes:
    """An If within an If within an If: each graph is an attribute of the one above."""
    body = graph([node("Identity", ["x"], ["y"])], [], [value("y", FLOAT, [2])])
    for _ in range(depth):
        body = graph([node("If", ["c"], ["y"], then_branch=body, else_branch=b"")], [], [value("y", FLOAT, [2])])
    return model(body)


def protobuf_bomb() -> bytes:
    """Groups within groups, to the depth of the file: what a reader without a limit answers with a stack overflow."""
    return field(7, varint(1 << 3 | 3) * (1 << 20))


def length_lie() -> bytes:
    """A graph that says it has 2 GB, and ends at once."""
    return field(1, 8) + varint(7 << 3 | 2) + varint(2**31 - 1) + b"\x0a\x00"


def doubling(times: int) -> bytes:
    """x joined with itself again and again: 2 floats become 2 ** (times + 1)."""
    names = ["x", *(f"v{i}" for i in range(1, times)), "y"]
    return of_nodes(*(node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)))


def endless() -> bytes:
    """A Loop without a bound whose condition stays true."""
    body = graph(
        [node("Identity", ["c"], ["c_out"]), node("Add", ["v", "one"], ["v_out"])],
        [value("i", INT64, []), value("c", BOOL, []), value("v", FLOAT, [2])],
        [value("c_out", BOOL, []), value("v_out", FLOAT, [2])],
        [models.tensor("one", np.ones(2, np.float32))],
    )
    return model(
        graph(
            [node("Loop", ["", "yes", "x"], ["y"], body=body)],
            [value("x", FLOAT, [2])],
            [value("y", FLOAT, [2])],
            [models.tensor("yes", np.array(True))],
        )
    )


def growing() -> bytes:
    """A Loop without a bound that scans out 4 KB a turn: it eats memory for as long as it is let."""
    body = graph(
        [node("Identity", ["c"], ["c_out"]), node("Expand", ["v", "shape"], ["s"]), node("Identity", ["v"], ["v_out"])],
        [value("i", INT64, []), value("c", BOOL, []), value("v", FLOAT, [1])],
        [value("c_out", BOOL, []), value("v_out", FLOAT, [1]), value("s", FLOAT, [1024])],
        [models.tensor("shape", np.array([1024]))],
    )
    return model(
        graph(
            [node("Loop", ["", "yes", "one"], ["kept", "all"], body=body), node("Add", ["x", "kept"], ["y"])],
            [value("x", FLOAT, [2])],
            [value("y", FLOAT, [2]), value("all", FLOAT, ["T", 1024])],
            [models.tensor("yes", np.array(True)), models.tensor("one", np.ones(1, np.float32))],
        )
    )


def unloadable() -> dict[str, Callable[[], bytes]]:
    """Story -> a file that must not even load."""
    return {
        "nothing": lambda: b"",
        "a picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(1000),
        "a file of zeros": lambda: bytes(1 << 20),
        "half a model": lambda: models.mlp()[: len(models.mlp()) // 2],
        "a protobuf bomb": protobuf_bomb,
        "a graph of 2 GB that is not there": length_lie,
        "an initializer of 2 GB that is not there": lambda: adding(claimed_tensor("w", (1 << 29,))),
        "an initializer of 2^62 items": lambda: adding(claimed_tensor("w", (1 << 31, 1 << 31), bytes(8))),
        "an initializer of negative size": lambda: adding(claimed_tensor("w", (-2,), bytes(8))),
        "weights in /etc/passwd": lambda: models.with_external_data("/etc/passwd"),
        "weights up the folders": lambda: models.with_external_data("../../../../../../etc/passwd"),
        "weights in the child's own memory": lambda: models.with_external_data("/proc/self/mem"),
        "weights in an endless device": lambda: models.with_external_data("/dev/zero"),
        "an operator of a library that it brings": lambda: of_nodes(node("Gift", ["x"], ["y"]) + field(7, "com.evil")),
        "a graph in a circle": lambda: of_nodes(node("Add", ["x", "b"], ["a"]), node("Add", ["a", "a"], ["b"])),
        "three thousand nodes without a result": lambda: of_nodes(*[node("Identity", ["x"], [""])] * 3000),
        "a graph three hundred deep": lambda: nested(300),
        "a sequence for an output": models.sequence_output,
    }


async def test_a_file_that_is_no_model_is_refused_with_the_reason_by_a_child_that_serves_on(
    runner: Runner, store: Store
) -> None:
    await assert_serves(runner, store(models.mlp()))
    pid = runner.pid
    for story, make in unloadable().items():
        expert = store(make())
        with pytest.raises(ModelError) as refused:
            await runner.load(expert, timeout_s=20)
        said = str(refused.value)
        assert len(said) < 700 and "\n" not in said and "root:" not in said, (story, said)
        assert runner.pid == pid, story
    await assert_serves(runner, store(models.mlp()))


@pytest.mark.parametrize(
    ("make", "seconds"), [(lambda: doubling(40), 20.0), (growing, 20.0)], ids=["doubling", "growing"]
)
async def test_an_expert_that_eats_memory_ends_at_its_bound_and_ours_stays(
    runner: Runner, store: Store, make: Callable[[], bytes], seconds: float
) -> None:
    hungry = store(make())
    await runner.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InferenceError, match=f"{MEMORY_MB} MB it may use|killed by SIG"):
        await runner.run(hungry, [X], timeout_s=seconds)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < OURS_MB << 10
    await assert_serves(runner, store(models.mlp()))


async def test_a_loop_without_end_is_ended_and_others_wait_no_longer_than_its_time(
    runner: Runner, store: Store
) -> None:
    endless_one, good = store(endless()), store(models.mlp())
    await runner.load(endless_one)
    began = time.monotonic()
    stuck = asyncio.create_task(runner.run(endless_one, [X], timeout_s=0.4))
    await asyncio.sleep(0)
    await assert_serves(runner, good)  # behind it in the queue
    with pytest.raises(InferenceError, match="exceeded 400 ms"):
        await stuck
    assert time.monotonic() - began < 10


async def test_a_symbolic_link_a_pipe_and_a_folder_are_no_model(runner: Runner, store: Store, tmp_path: Path) -> None:
    """What lies under a digest's name may be put there by somebody else: only its content counts."""
    good = store(models.mlp())
    link, pipe = tmp_path / "link.onnx", tmp_path / "pipe.onnx"
    link.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=r"regular file|cannot be read"):
            await runner.load(ExpertFile(good.digest, path), timeout_s=5)
    await assert_serves(runner, good)
