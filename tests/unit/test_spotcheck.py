"""What a validator executes again: the rate of its draws, a queue that cannot be flooded, and inputs it believes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ledger_fixtures import Fleet, inputs_for, toy

from bmoe.ledger.refute import read_inputs
from bmoe.ledger.rules.entries import BY_REFEREE, Verdict, parse_entry
from bmoe.ledger.spotcheck import QUEUE_MAX, SUSPECTS_MAX, Job, Rates, SpotChecks
from bmoe.protocol.errors import MessageError


class Named:
    """All that the queue asks of a frame author."""

    name = "validator-1"


def checks_of(fleet: Fleet, rates: Rates = Rates()) -> SpotChecks:  # noqa: B008 (frozen)
    return SpotChecks(fleet.state, Named(), None, rates)  # type: ignore[arg-type]


def queued(checks: SpotChecks) -> list[tuple[str, bytes]]:
    return [(job.cause, job.task) for queue in checks._queues.values() for job in queue]


def told(checks: SpotChecks, applied: Any) -> None:
    for event in applied.events:
        checks.on_event(event.kind, event.facts)


def test_rate_starts_high_and_never_falls_to_zero() -> None:
    rates = Rates()
    assert [rates.rate(n) for n in (0, 200, 600)] == [0.25, 0.125, 0.0625]
    assert rates.rate(10**9) == 0.02


def test_flood_of_draws_gives_way_to_claims_and_complaints() -> None:
    fleet = Fleet()
    fleet.found()
    checks = checks_of(fleet)
    for i in range(QUEUE_MAX * 2):
        checks.queue(Job(i.to_bytes(16, "big"), "spot"))
    assert len(queued(checks)) == QUEUE_MAX
    assert checks.queue(Job(b"c" * 16, "claim")) and checks.queue(Job(b"d" * 16, "complaint", b"message"))
    assert len(queued(checks)) == QUEUE_MAX
    assert queued(checks)[:2] == [("complaint", b"d" * 16), ("claim", b"c" * 16)]
    for i in range(QUEUE_MAX):
        checks.queue(Job(i.to_bytes(16, "little"), "complaint", b""))
    assert not checks.queue(Job(b"e" * 16, "complaint", b"")), "nothing matters less than this any more"
    assert len(queued(checks)) == QUEUE_MAX


def test_referees_claim_is_always_executed_again_and_single_never() -> None:
    fleet = Fleet()
    fleet.found()
    checks = checks_of(fleet, Rates(1.0, 1.0))
    task = fleet.open_task()
    outputs = [fleet.output("agent-1", task), fleet.output("agent-2", task, toy(task.x) + 1)]
    referee = fleet.output("coordinator", task)
    told(checks, fleet.decide(task, outputs, referee=referee, accepted=BY_REFEREE, policy="referee"))
    alone = fleet.open_task()
    told(checks, fleet.decide(alone, [fleet.output("agent-1", alone)], policy="single"))
    assert queued(checks) == [("claim", task.task)]
    again = checks_of(fleet)
    again.on_restart()
    assert queued(again) == [("claim", task.task)], "a claim that waits for our word survives a restart"


def test_refuted_agents_unexamined_verdicts_become_suspects_newest_first_and_bounded() -> None:
    fleet = Fleet()
    fleet.found()
    checks = checks_of(fleet, Rates(0.0, 0.0))
    tasks = []
    for _ in range(SUSPECTS_MAX + 3):
        task = fleet.open_task()
        tasks.append((task, [fleet.output(a, task, toy(task.x) + 1) for a in fleet.agents[:3]]))
        told(checks, fleet.decide(*tasks[-1]))
    assert queued(checks) == []
    task, outputs = tasks[-1]
    told(checks, fleet.challenge(task, fleet.output("validator-1", task), outputs[:1]))
    assert queued(checks) == [("suspect", t.task) for t, _ in tasks[::-1][:SUSPECTS_MAX]]


def test_input_that_is_not_the_verdicts_is_not_executed() -> None:
    fleet = Fleet()
    fleet.found()
    task = fleet.open_task()
    fleet.decide(task, [fleet.output(a, task) for a in fleet.agents[:3]])
    entry = parse_entry(fleet.leaves[-1])
    assert isinstance(entry, Verdict)
    release = fleet.state.releases[entry.expert]
    (x,) = read_inputs(fleet.task_message(task, "agent-1"), entry, release)
    assert np.array_equal(np.frombuffer(x.data, "<f4").reshape(x.dims), task.x)
    other, _ = fleet.opened(inputs_for(2, seed=9))
    with pytest.raises(MessageError, match="is of another task"):
        read_inputs(fleet.task_message(other, "agent-1"), entry, release)
    forged = type(task)(task.task, other.x, task.salt, task.input_root)
    with pytest.raises(MessageError, match="not the input that its verdict commits to"):
        read_inputs(fleet.task_message(forged, "agent-1"), entry, release)
