"""A real `bmoe-agent run` against a real broker: answers once and for all, dies and comes back, complains, says farewell."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from agent_bench import COMMAND, EXPERT, Bench, bench
from agent_helpers import NAME, now_ms

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Sealed, Task, open_message, tensors_from
from bmoe.protocol.topics import topic

__all__ = ["bench"]  # a fixture


def tensors_of(output: Sealed[Any]) -> Any:
    tensors = tensors_from(output.header.outputs, output.parts[1:])
    assert commit_rows(NAME, output.parts[0], tensors, output.header.rows) == output.header.output_root
    return tensors


async def test_a_task_is_answered_signed_and_bound_and_the_same_bytes_come_again(bench: Bench) -> None:
    bench.start(health_every_s=0.3)
    await bench.online()
    message = bench.gateway.task(EXPERT, rows=3)
    await bench.send(message)
    [output] = await bench.until("output", 1)
    asked = open_message(Task, message, 65).header
    bound = (asked.task, asked.expert, asked.input_root, asked.rows)
    assert (output.header.task, output.header.expert, output.header.input_root, output.header.rows) == bound
    assert [t.dims for t in tensors_of(output)] == [(3, 3), (3,)]
    # Until the broker has acknowledged the first it is still on its way, and a repeated task adds none.
    await bench.ear.until(lambda: any(h.header.answered and not h.header.unreported for h in bench.heard("health")), 20)
    await bench.send(message)
    again = await bench.until("output", 2)
    assert again[0].message() == again[1].message(), "another signature for the same task would be perjury"
    [*_, health] = await bench.until("health", 2)
    assert (health.header.answered, health.header.unreported) == (1, 0)


async def test_refusals_name_their_reason_and_strangers_get_none(bench: Bench) -> None:
    bench.start(queue_limit=1)
    await bench.online()
    for stranger in (b"noise", bench.gateway.task(EXPERT, signer=Signer.generate())):
        await bench.send(stranger)
    cases = {
        "expired": bench.gateway.task(EXPERT, deadline_ms=1),
        "failed": bench.gateway.task(bytes(32)),  # the fleet server is away: whether there is one cannot be known
        "bad-input": bench.gateway.task(EXPERT, inputs=[]),
    }
    for count, message in enumerate(cases.values(), 1):
        await bench.send(message)
        await bench.until("refusal", count)
    assert [r.header.reason for r in bench.heard("refusal")] == list(cases)
    for _ in range(30):
        bench.ear.link.publish(topic(NAME, "task"), bench.gateway.task(EXPERT, rows=64))
    await bench.ear.until(lambda: len(bench.heard("refusal")) + len(bench.heard("output")) == 33, 20)
    assert {r.header.reason for r in bench.heard("refusal")[3:]} == {"busy"}
    assert "kind=unknown-signer" in bench.log() and "kind=malformed" in bench.log()


async def test_an_output_that_the_broker_did_not_acknowledge_survives_a_kill(bench: Bench) -> None:
    bench.start()
    await bench.online()
    await bench.send(bench.gateway.task(EXPERT))
    first = (await bench.until("output", 1))[0]
    assert bench.process is not None and bench.broker.process is not None
    message = bench.gateway.task(EXPERT, deadline_ms=now_ms() + 60_000)
    bench.broker.process.send_signal(signal.SIGSTOP)
    bench.ear.link.publish(topic(NAME, "task"), message)
    bench.process.send_signal(signal.SIGSTOP)  # so that the task is on its way and no answer can leave
    bench.broker.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.2)
    bench.broker.kill()
    bench.process.send_signal(signal.SIGCONT)
    await wait_for_kept(bench.state, 2)
    bench.end()
    await bench.broker.start()
    bench.start()
    # The first one comes again, perhaps: that the broker has it was not noted on disk before the kill.
    task = open_message(Task, message, 65).header.task
    await bench.ear.until(lambda: any(o.header.task == task for o in bench.heard("output")), 20)
    heard = bench.heard("output")
    output = next(o for o in heard if o.header.task == task)
    assert output.header.seq > first.header.seq
    await bench.online()
    assert {o.message() for o in heard} == {first.message(), output.message()}
    await bench.send(message)
    await bench.ear.until(lambda: [o.message() for o in bench.heard("output")].count(output.message()) == 2, 20)


async def wait_for_kept(state: Path, count: int) -> None:
    """Until the outbox holds so many outputs: it is read by another process, so there is nothing to await."""
    import sqlite3

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with sqlite3.connect(state / "outbox.db") as db:
            if db.execute("SELECT count(*) FROM output").fetchone()[0] == count:
                return
        await asyncio.sleep(0.02)
    raise AssertionError((state / "log").read_text())


async def test_a_misjudged_or_unmentioned_output_becomes_a_complaint_that_stands_by_itself(bench: Bench) -> None:
    bench.start(notice_wait_s=1)
    await bench.online()
    messages = [bench.gateway.task(EXPERT, deadline_ms=now_ms() + 1500) for _ in range(4)]
    for message in messages:
        await bench.send(message)
    outputs = {o.header.task: o for o in await bench.until("output", 4)}
    tasks = [open_message(Task, message, 65).header.task for message in messages]
    told = [outputs[task].header for task in tasks]
    await bench.send(bench.notice(told[0], "a"), "notice")
    await bench.send(bench.notice(told[1], "d"), "notice")
    await bench.send(bench.notice(told[2], "a", root=bytes(32)), "notice")
    claims = await bench.until("complaint", 3)
    assert [(c.header.task, c.header.reason) for c in claims] == [
        (tasks[1], "misjudged"), (tasks[2], "misjudged"), (tasks[3], "missing"),
    ]  # fmt: skip
    for claim, number in zip(claims, (1, 2, 3), strict=True):
        assert claim.parts == (messages[number], outputs[tasks[number]].message())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly_and_a_kill_leaves_the_will(bench: Bench, number: int) -> None:
    bench.start()
    await bench.online()
    assert bench.process is not None
    bench.process.send_signal(number)
    assert await asyncio.to_thread(bench.process.wait, 10) == 0
    await bench.until("status", 2)
    assert [s.header.state for s in bench.heard("status")] == ["online", "stopping"]
    assert "Traceback" not in bench.log() and "event=stopped" in bench.log()
    bench.start()
    await bench.online()
    bench.process.kill()
    await bench.ear.until(lambda: bench.heard("status")[-1].header.state == "lost", 20)


async def test_a_second_process_on_the_same_directory_is_turned_away(bench: Bench) -> None:
    bench.start()
    await bench.online()
    second = [*COMMAND, str(bench.state)]
    done = await asyncio.to_thread(subprocess.run, second, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "another bmoe-agent runs" in done.stderr


def pss_mb(pid: int) -> float:
    """The memory of a process and its children, shared pages by their share."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    line = next(s for s in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if s.startswith("Pss:"))
    return int(line.split()[1]) / 1024 + sum(pss_mb(int(child)) for child in children)


async def test_it_is_small_and_there_at_once(bench: Bench) -> None:
    started = time.monotonic()
    bench.start()
    await bench.online()
    took = time.monotonic() - started
    for count in range(50):
        await bench.send(bench.gateway.task(EXPERT, rows=16))
        await bench.until("output", count + 1)
    assert bench.process is not None
    used = pss_mb(bench.process.pid)
    print(f"birth {took:.2f} s, {used:.0f} MB PSS")
    assert used < 150
    assert took < 10, "3 s on an idle machine; tests share theirs"
