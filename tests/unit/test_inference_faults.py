"""Experts that hang, bomb, crash or lose their caller: that one task fails, and the next is answered."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
from inference_helpers import (
    MEMORY_MB,
    Store,
    assert_serves,
    busy,
    cpu_seconds,
    rows,
    slow_inputs,
    tensor,
)

from bmoe.inference.runner import Runner
from bmoe.protocol.errors import ConfigError, InferenceError, UnavailableError


async def test_an_expert_stuck_in_native_code_is_killed_and_the_event_loop_never_waited(
    runner: Runner, store: Store
) -> None:
    slow, good = store(models.slow()), store(models.mlp())
    await runner.load(slow)
    stuck, gaps = runner.pid, []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - before)

    ticker = asyncio.create_task(tick())
    with pytest.raises(InferenceError, match=rf"{slow.digest.hex()[:12]} exceeded 500 ms; worker killed and restarted"):
        await runner.run(slow, slow_inputs(), timeout_s=0.5)
    ticker.cancel()
    assert len(gaps) > 10 and max(gaps) < 0.3
    assert runner.pid != stuck
    await assert_serves(runner, good)
    assert (await runner.run(slow, slow_inputs(np.array(2)), timeout_s=30)).outputs[0].dims == (128, 128)


async def test_a_worker_killed_while_it_runs_fails_that_task_alone(runner: Runner, store: Store) -> None:
    task = await busy(runner, store(models.slow()))
    os.kill(runner.pid or 0, signal.SIGKILL)
    with pytest.raises(InferenceError, match="killed by SIGKILL; restarted"):
        await task
    await assert_serves(runner, store(models.mlp()))


async def test_a_worker_killed_while_idle_is_replaced_unnoticed(runner: Runner, store: Store) -> None:
    await runner.start()
    pid = runner.pid or 0
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([handle], [], [], 10)
    os.close(handle)
    await assert_serves(runner, store(models.mlp()))
    assert runner.pid not in (None, pid)


async def test_a_memory_bomb_is_a_failed_task_and_not_a_dead_machine(runner: Runner, store: Store) -> None:
    hungry, good = store(models.hungry()), store(models.mlp())
    for items in (MEMORY_MB << 18, 2**33, 2**50):
        with pytest.raises(InferenceError, match=f"needs more memory than the {MEMORY_MB} MB it may use"):
            await runner.run(hungry, [tensor("items", np.array([items]))], timeout_s=30)
        await assert_serves(runner, good)
    peak = next(line for line in Path(f"/proc/{runner.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) >> 10 < MEMORY_MB + 100
    small = await runner.run(hungry, [tensor("items", np.array([1000]))], timeout_s=30)
    assert small.outputs[0].data == bytes(4)


async def test_inputs_larger_than_the_workers_memory_are_refused_before_they_are_sent(store: Store) -> None:
    async with Runner(memory_mb=1) as runner:
        with pytest.raises(InferenceError, match="inputs of 2000050 bytes exceed the 1 MB it may use"):
            await runner.run(store(models.echo()), [tensor("x", np.zeros((250_000, 2), np.float32))], timeout_s=30)
        assert runner.pid is None


async def test_a_request_that_just_fits_the_limit_but_not_the_worker_is_skipped_over(store: Store) -> None:
    expert, x = store(models.echo()), np.zeros(((16 << 17) - 100, 2), np.float32)
    async with Runner(memory_mb=16) as runner:
        with pytest.raises(InferenceError, match="needs more memory than the 16 MB it may use"):
            await runner.run(expert, [tensor("x", x)], timeout_s=30)
        await assert_serves(runner, store(models.mlp()))


async def test_whether_a_large_expert_fits_does_not_depend_on_those_used_before(store: Store) -> None:
    large = [store(models.mlp(columns=60_000, seed=seed)) for seed in range(3)]
    x = np.ones((1, 60_000), np.float32)
    async with Runner(memory_mb=32) as runner:
        answers = [(await runner.run(expert, [tensor("x", x)], timeout_s=30)).outputs for expert in large * 2]
    assert answers[:3] == answers[3:]


async def test_a_task_without_time_left_is_refused_and_costs_no_worker(runner: Runner, store: Store) -> None:
    expert = store(models.mlp())
    await assert_serves(runner, expert)
    pid = runner.pid
    with pytest.raises(InferenceError, match="no time left"):
        await runner.run(expert, [tensor("x", rows(1))], timeout_s=-0.2)
    assert runner.pid == pid


async def test_a_caller_cancelled_mid_run_does_not_leave_its_answer_to_the_next(runner: Runner, store: Store) -> None:
    task = await busy(runner, store(models.slow()))
    pid = runner.pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_serves(runner, store(models.mlp()))
    assert runner.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid or 0, 0)


async def test_a_caller_cancelled_at_any_moment_leaves_the_runner_working(runner: Runner, store: Store) -> None:
    expert, x = store(models.mlp()), tensor("x", rows(2))
    for turns in range(12):
        task = asyncio.create_task(runner.run(expert, [x], timeout_s=30))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await assert_serves(runner, expert)


async def test_a_caller_cancelled_in_the_queue_disturbs_nobody(runner: Runner, store: Store) -> None:
    slow = store(models.slow())
    await runner.load(slow)
    pid = runner.pid
    running = asyncio.create_task(runner.run(slow, slow_inputs(np.array(2000)), timeout_s=30))
    queued = asyncio.create_task(runner.run(slow, slow_inputs(np.array(2000)), timeout_s=30))
    await asyncio.sleep(0)
    queued.cancel()
    assert (await running).outputs[0].dims == (128, 128)
    assert queued.cancelled() and runner.pid == pid


async def test_closing_ends_the_running_task_the_waiting_one_and_the_process(runner: Runner, store: Store) -> None:
    slow = store(models.slow())
    running, pid = await busy(runner, slow), runner.pid
    waiting = asyncio.create_task(runner.run(slow, slow_inputs(), timeout_s=60))
    await asyncio.sleep(0)
    await runner.close()
    with pytest.raises(InferenceError, match="SIGKILL"):
        await running
    with pytest.raises(UnavailableError, match="the runner is closed"):
        await waiting
    assert runner.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid or 0, 0)


PARENT = """
import asyncio, sys
from pathlib import Path
from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.tensors import Tensor

async def main():
    runner = Runner()
    expert = ExpertFile(bytes.fromhex(sys.argv[1]), Path(sys.argv[2]))
    await runner.load(expert)
    print(runner.pid, flush=True)
    turns = Tensor("turns", "int64", (), (10**15).to_bytes(8, "little"))
    await runner.run(expert, [turns, Tensor("x", "float32", (128, 128), bytes(4 * 128 * 128))], timeout_s=60)

asyncio.run(main())
"""


def test_a_worker_deep_in_a_run_dies_with_a_parent_killed_by_sigkill(store: Store) -> None:
    slow = store(models.slow())
    command = [sys.executable, "-c", PARENT, slow.digest.hex(), str(slow.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline, before = time.monotonic() + 20, cpu_seconds(pid)
        while cpu_seconds(pid) < before + 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        worker = os.pidfd_open(pid)
        parent.kill()
    gone, _, _ = select.select([worker], [], [], 10)
    os.close(worker)
    assert gone


async def test_the_worker_ignores_the_terminals_and_the_service_managers_signals(runner: Runner, store: Store) -> None:
    await assert_serves(runner, store(models.mlp()))
    pid = runner.pid or 0
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    await assert_serves(runner, store(models.mlp()))
    assert runner.pid == pid and os.getsid(pid) != os.getsid(0)


async def test_a_worker_that_cannot_start_says_why_and_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named onnxruntime >&2\nexit 3\n")
    broken.chmod(0o755)
    runner = Runner()
    for executable, error, reason in (
        (str(broken), ConfigError, "did not start: .*exited with status 3: no module named onnxruntime"),
        ("/nonexistent/python", UnavailableError, "cannot be started"),
    ):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(error, match=reason):
            await runner.start()
        assert runner.pid is None
    monkeypatch.undo()
    await assert_serves(runner, store(models.mlp()))
    await runner.close()
