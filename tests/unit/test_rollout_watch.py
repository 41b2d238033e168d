"""What is seen of a version: whose silence counts, which times do; trials that fail; and whose turn it is on a board."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_fixtures import TOY, Fleet, tensor_of
from rules_helpers import founded

from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY, Rollout
from bmoe.ledger.rules.outputs import tolerances_of
from bmoe.ledger.rules.policies import POLICIES, Decision
from bmoe.protocol.errors import BmoeError, InferenceError, UnavailableError
from bmoe.protocol.tensors import Tensor
from coordinator.catalogue import Catalogue
from coordinator.collect import Collection, Received
from coordinator.flower.layout import FlowerLayout
from coordinator.jobs import Answered, Call, Job, Request, Result
from coordinator.rollout.carrier import TELL_AGAIN_S, TELL_SELDOM_S, TOLD_OFTEN, TURN_S, Carrier
from coordinator.rollout.course import Course
from coordinator.rollout.machine import Progress
from coordinator.rollout.trial import Trials
from coordinator.rollout.watch import Watch, watch_of
from coordinator.share import make_job

NEW = bytes(31) + b"\x07"
X = np.ones((2, 4), np.float32)


@pytest.fixture(scope="module")
def ledger() -> Fleet:
    """Version 1 of `toy` has the expert TOY, version 2 NEW."""
    ledger = founded()
    ledger.enter("registrar", ledger.release(NEW, "toy-new"), ledger.model([NEW], version=2))
    return ledger


@pytest.fixture
def watch(ledger: Fleet) -> Watch:
    return watch_of(*(ledger.state.versions["toy", version] for version in (2, 1)))


class Tasks:
    """Tasks that close: `answers` are agents' seconds and letters, `refusals` and `silent` what the others did."""

    def __init__(self, ledger: Fleet, watch: Watch) -> None:
        self.ledger, self.watch = ledger, watch

    async def close(
        self, expert: bytes, answers: dict[str, tuple[float, str]], accepted: int = 0, late: bool = False,
        refusals: dict[str, str] | None = None, silent: Sequence[str] = (), heard: bool = True,
    ) -> None:  # fmt: skip
        release = self.ledger.state.releases[expert]
        job: Job = make_job((Call("public", release, "referee", (tensor_of("x", X),), 2),), self.ledger.now_ms)
        now = time.monotonic()
        tolerances = tolerances_of(release)
        collection = Collection(POLICIES["referee"], tolerances, now - 1 if late else now + 60, 1.0)
        for agent in (*answers, *(refusals or {}), *silent):
            collection.assigned[agent] = now
        for agent, (seconds, _) in answers.items():
            collection.received[agent] = Received(agent, b"", b"", b"", (), None)
            collection.took[agent] = seconds
        collection.refused.update(refusals or {})
        letters = "".join(letter for _, letter in answers.values())
        self.watch.closed(job, collection, Decision(accepted, letters), lambda agent: now + 1 if heard else now - 1)


@pytest.fixture
def tasks(ledger: Fleet, watch: Watch) -> Tasks:
    return Tasks(ledger, watch)


async def test_an_agent_that_cannot_compute_the_version_is_seen_though_the_referee_answers(tasks: Tasks) -> None:
    for reason in ("failed", "unknown-expert", "busy", "offline"):
        await tasks.close(NEW, {}, BY_REFEREE, refusals={"agent-1": reason})
    seen = tasks.watch.of_new.agents["agent-1"]
    assert (seen.asked, seen.failed) == (2, 2), "that it was busy or away says nothing of the version"
    assert (tasks.watch.of_new.tasks, tasks.watch.of_new.failed) == (4, 0)


async def test_silence_counts_once_the_deadline_has_passed_and_not_where_others_were_quicker(tasks: Tasks) -> None:
    await tasks.close(NEW, {"agent-1": (0.1, "a"), "agent-2": (0.1, "a")}, silent=["agent-3"])
    assert "agent-3" not in tasks.watch.of_new.agents
    await tasks.close(NEW, {"agent-1": (0.1, "a")}, BY_REFEREE, late=True, silent=["agent-3"])
    assert tasks.watch.of_new.agents["agent-3"].failed == 1
    await tasks.close(NEW, {}, BY_REFEREE, late=True, silent=["agent-4"], heard=False)
    assert "agent-4" not in tasks.watch.of_new.agents, "it lost its power, which is no fault of the version"


async def test_dissent_is_noted_with_whoever_dissents(tasks: Tasks) -> None:
    await tasks.close(NEW, {"agent-1": (0.1, "a"), "agent-2": (0.1, "d"), "agent-3": (0.1, "u")})
    await tasks.close(NEW, {"agent-1": (0.1, "i")}, NOBODY)
    found = {agent: seen.dissent for agent, seen in tasks.watch.of_new.agents.items()}
    assert found == {"agent-1": 0, "agent-2": 1, "agent-3": 1} and tasks.watch.of_new.failed == 1


async def test_the_first_time_an_expert_is_loaded_is_no_latency(tasks: Tasks) -> None:
    for seconds in (9.0, 0.1, 0.2):
        await tasks.close(NEW, {"agent-1": (seconds, "a")}, BY_REFEREE)
    assert list(tasks.watch.of_new.agents["agent-1"].seconds) == [0.1, 0.2]


async def test_a_board_that_waits_for_its_slow_tasks_does_not_look_slow_with_the_version_in_use(tasks: Tasks) -> None:
    for _ in range(3):
        await tasks.close(TOY, {"agent-1": (0.1, "a"), "agent-2": (0.1, "a")})
    await tasks.close(NEW, {"agent-1": (5.0, "a")}, BY_REFEREE)
    tasks.watch = tasks.watch.next_stage()
    await tasks.close(TOY, {"agent-1": (5.0, "a"), "agent-2": (0.1, "a")})
    used = tasks.watch.of_used.agents
    assert (list(used["agent-1"].seconds), list(used["agent-2"].seconds)) == ([0.1] * 2, [0.1] * 3)
    assert tasks.watch.of_new.tasks == 0, "each stage judges anew"


# Trials.


def answered(ledger: Fleet) -> Answered:
    model = Catalogue(ledger.state).version("toy", 1)
    request = Request(bytes(16), "public", model, (tensor_of("x", X),), 2, "referee", "decided", "", 0)
    return Answered(request, Result((tensor_of("y", X[:, :1]),), b"", b"", b"", b""), (), "decided", b"")


async def tried(ledger: Fleet, watch: Watch, outcome: BmoeError | tuple[Tensor, ...]) -> Watch:
    running: list[Awaitable[None]] = []

    async def trial(request: Request) -> Sequence[Tensor]:
        assert request.model.statement.version == 2
        if isinstance(outcome, BmoeError):
            raise outcome
        return outcome

    course = Course(watch, Progress("canary"))
    Trials(trial, running.append).begin(answered(ledger), Catalogue(ledger.state).version("toy", 2), course)
    await asyncio.gather(*running)
    assert course.trials == 0
    return watch


async def test_a_trial_compares_what_both_versions_answer(ledger: Fleet, watch: Watch) -> None:
    new = (await tried(ledger, watch, (tensor_of("y", np.array([[1.0], [9.0]], np.float32)),))).of_new
    assert (new.requests, new.rows, new.differing) == (1, 2, 1)


async def test_a_gate_that_fails_is_an_answer_that_differs_and_a_task_that_fails_is_counted_once(
    ledger: Fleet, watch: Watch
) -> None:
    new = (await tried(ledger, watch, InferenceError("the gate crashed"))).of_new
    assert (new.requests, new.rows, new.differing) == (1, 2, 2)
    new = (await tried(ledger, watch, UnavailableError("no verdict on task 00"))).of_new
    assert (new.requests, new.rows) == (1, 2), "its task has told"


async def test_a_version_with_other_outputs_is_tried_though_it_cannot_be_compared(ledger: Fleet, watch: Watch) -> None:
    release = ledger.state.releases[NEW]
    other = dataclasses.replace(release, outputs=tuple(("z", *output[1:]) for output in release.outputs))
    ledger.state.releases[NEW] = other
    try:
        new = (await tried(ledger, watch, (tensor_of("z", X),))).of_new
    finally:
        ledger.state.releases[NEW] = release
    assert (new.requests, new.rows) == (1, 0)


# Whose turn it is.

ENTRY = Rollout(
    ledger=bytes(16), epoch=0, author="coordinator", seq=1, time_ms=5, rollout=b"r" * 16, model="toy", version=2,
    wave=("edge-01",), stage="share", reason="",
)  # fmt: skip
OTHER = replace(ENTRY, rollout=b"s" * 16, model="other")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Carrier, list[str], Any]:
    """A carrier, whom it told of which model, and the clock."""
    clock, said = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    async def parcel(rollout: Rollout) -> Any:
        raise AssertionError("nothing is pushed here")

    def tell(agent: str, rollout: Rollout, carrier: str) -> None:
        said.append(f"{agent} {rollout.model}")

    return Carrier(FlowerLayout(tmp_path), lambda: None, tell, parcel, 0.0), said, clock


def test_two_rollouts_at_once_do_not_interrupt_each_other_on_a_board(told: tuple[Carrier, list[str], Any]) -> None:
    carrier, said, clock = told
    for _ in range(int(TURN_S)):
        carrier.bring(ENTRY, ["edge-01"], "https")
        carrier.bring(OTHER, ["edge-01", "edge-02"], "https")
        clock[0] += 1
    assert set(said) == {"edge-01 toy", "edge-02 other"}
    carrier.forget(ENTRY.rollout, {"edge-01"})
    carrier.bring(OTHER, ["edge-01"], "https")
    assert said[-1] == "edge-01 other", "once it has the one it is told of the other"


def test_a_board_that_is_silent_for_its_turn_is_told_of_the_other_rollout(told: tuple[Carrier, list[str], Any]) -> None:
    carrier, said, clock = told
    carrier.bring(ENTRY, ["edge-01"], "https")
    clock[0] += TURN_S
    carrier.bring(OTHER, ["edge-01"], "https")
    assert said == ["edge-01 toy", "edge-01 other"]


def test_whoever_never_says_a_word_is_told_more_and_more_seldom(told: tuple[Carrier, list[str], Any]) -> None:
    carrier, said, clock = told
    for _ in range(TOLD_OFTEN + 3):
        carrier.bring(ENTRY, ["edge-01"], "https")
        clock[0] += TELL_AGAIN_S
    assert len(said) == TOLD_OFTEN
    clock[0] += TELL_SELDOM_S
    carrier.bring(ENTRY, ["edge-01"], "https")
    assert len(said) == TOLD_OFTEN + 1
    carrier._errands[ENTRY.rollout, "edge-01"].have = {"aa": 7}
    carrier.away(ENTRY.rollout, {"edge-01"})
    carrier.bring(ENTRY, ["edge-01"], "https")
    assert len(said) == TOLD_OFTEN + 2, "it was away, and is back"
    assert carrier._errands[ENTRY.rollout, "edge-01"].have == {"aa": 7}, "no push begins again from zero"
