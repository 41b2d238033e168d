"""The driver of rollouts on a folded ledger: who is told and asked, which version answers, what a restart keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from ledger_fixtures import TOY
from rules_helpers import founded

from bmoe.ledger.rules.entries import Rollout
from bmoe.protocol.errors import RefusedError, UnknownError
from bmoe.protocol.messages import Installed
from coordinator.catalogue import Catalogue
from coordinator.fleet import Fleet
from coordinator.rollout.driver import Rollouts
from coordinator.rollout.health import Limits
from coordinator.rollout.plan import Plan
from coordinator.rollout.store import Plans

NEW = bytes(31) + b"\x07"
AT_ONCE = Plan(canary_count=1, share=0.5, soak_s=0.0, limits=Limits(tasks=0))


class World:
    """A ledger with version 1 of `toy` in use and version 2 published; a driver; what it had carried to whom."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.folder = founded(), folder
        self.ledger.enter("registrar", self.ledger.release(NEW, "toy-new"), self.ledger.model([NEW], version=2))
        self.fleet = Fleet(self.ledger.state, folder / "fleet.json")
        for agent in self.ledger.agents:
            self.fleet.of(agent).online = True
        self.driver = self.started()

    def started(self) -> Rollouts:
        """A driver as at the start of a coordinator."""
        self.brought: list[str] = []

        async def enter(fields: dict[str, Any]) -> None:
            self.ledger.enter("coordinator", (Rollout, fields))

        async def trial(request: Any) -> Any:
            raise AssertionError("nothing is tried here")

        def spawn(work: Awaitable[None]) -> object:
            return asyncio.ensure_future(work)

        catalogue, plans = Catalogue(self.ledger.state), Plans(self.folder / "rollouts.json")
        driver = Rollouts(self.ledger.state, self.fleet, catalogue, plans, enter, trial, spawn, at_once=2)
        driver.carrier = self  # type: ignore[assignment]
        return driver

    def bring(self, rollout: Rollout, agents: list[str], over: str) -> None:
        self.brought = agents

    def forget(self, rollout: bytes, agents: set[str] | None = None) -> None:
        self.brought = []

    async def look(self, times: int = 1) -> Rollout:
        """So many of the driver's seconds; where the rollout stands then."""
        for _ in range(times):
            await self.driver._look(self.ledger.state.rollouts["toy"])
        return self.ledger.state.rollouts["toy"]

    def says(self, agent: str, state: str, reason: str = "") -> None:
        """An agent's word on the rollout."""
        rollout = self.ledger.state.rollouts["toy"].rollout
        header = Installed(
            **self.ledger.common(agent, 1), rollout=rollout, model="toy", version=2, state=state, reason=reason,
            carrier="https",
        )  # fmt: skip
        self.driver.on_installed(agent, header)

    def answers(self, count: int = 200) -> set[int]:
        """The versions that answer so many requests."""
        return {self.driver.pick("toy").statement.version for _ in range(count)}

    def asked(self, expert: bytes) -> set[str]:
        """Who may get a task for an expert."""
        return {eligible.agent for eligible in self.fleet.eligible((), expert=expert)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_the_canary_gets_the_version_and_nobody_is_answered_by_it(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    entry = await world.look()
    assert (entry.stage, entry.wave) == ("canary", ("agent-1",)) and world.brought == ["agent-1"]
    assert world.asked(NEW) == set(), "a task for what nobody holds is the referee's"
    world.says("agent-1", "installed")
    await world.look()
    assert world.answers() == {1} and world.asked(NEW) == {"agent-1"} and len(world.asked(TOY)) == 5


async def test_the_share_answers_as_many_requests_as_agents_hold_it_and_all_hold_it_in_the_end(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    for _ in range(12):
        entry = await world.look()
        if entry.stage == "share":
            assert world.answers() == ({1, 2} if world.asked(NEW) else {1})
        for agent in world.brought:
            world.says(agent, "installed")
        if entry.stage == "done":
            break
    assert entry.stage == "done" and world.answers() == {2}
    assert len(world.asked(NEW)) == 5, "once it is in use, it is anybody's"


async def test_no_more_agents_install_at_once_than_are_allowed_and_those_that_failed_come_last(world: World) -> None:
    await world.driver.start("toy", 2, Plan(canary_count=4, soak_s=0.0))
    await world.look()
    assert world.brought == ["agent-1", "agent-2"]
    world.says("agent-1", "failed", "the disk is full")
    await world.look()
    assert world.brought == ["agent-2", "agent-3"]


async def test_a_refusal_goes_back_with_its_reason_on_the_ledger(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look()
    world.says("agent-1", "refused", "self-test: y differs by 3")
    entry = await world.look()
    assert (entry.stage, entry.reason) == ("rolled-back", "canary: agent-1 refuses it: self-test: y differs by 3")
    assert world.answers() == {1} and world.ledger.state.models["toy"].version == 1


async def test_the_word_of_an_agent_outside_of_the_wave_moves_nothing(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look()
    world.says("agent-5", "refused", "I am a liar")
    assert (await world.look()).stage == "canary"
    world.says("agent-4", "installed")
    assert (await world.look()).stage == "canary" and world.asked(NEW) == set()


async def test_a_coordinator_that_was_killed_goes_on_and_asks_again_who_holds_it(world: World) -> None:
    await world.driver.start("toy", 2, Plan(canary_count=2, soak_s=3600.0))
    await world.look()
    world.says("agent-1", "installed")
    await world.look()
    world.driver = world.started()
    entry = await world.look()
    assert (entry.stage, entry.wave) == ("canary", ("agent-1", "agent-2")) and world.brought == ["agent-1", "agent-2"]
    assert world.driver.table()[0]["tasks_needed"] == Plan().limits.tasks


async def test_agents_that_are_away_for_days_hold_up_nobody_and_are_told_when_they_are_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fleet.of("agent-5").online = False
    await world.driver.start("toy", 2, Plan(canary_count=5, share=1.0, soak_s=86_400.0, limits=Limits(tasks=0)))
    entry = await world.look()
    while world.brought:
        for agent in world.brought:
            world.says(agent, "installed")
        entry = await world.look()
    assert len(entry.wave) == 4
    days = time.time() + 3 * 86_400.0
    monkeypatch.setattr(time, "time", lambda: days)
    await world.look(2)
    entry = await world.look()
    assert entry.stage == "share" and "agent-5" in entry.wave and world.brought == []
    world.fleet.of("agent-5").online = True
    await world.look()
    assert world.brought == ["agent-5"]


async def test_a_paused_rollout_answers_nobody_and_brings_nothing(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look()
    assert (await world.driver.act("toy", "pause", "a look at a board")).reason == "a look at a board"
    world.brought = []
    await world.look(3)
    assert world.brought == [] and world.answers() == {1}
    with pytest.raises(RefusedError, match="nothing to pause"):
        await world.driver.act("toy", "pause", "")
    await world.driver.act("toy", "resume", "")
    await world.look()
    assert world.brought == ["agent-1"]


async def test_an_abort_leaves_the_version_in_use_and_another_rollout_may_follow(world: World) -> None:
    first = await world.driver.start("toy", 2, AT_ONCE)
    with pytest.raises(RefusedError, match="is under way"):
        await world.driver.start("toy", 2, AT_ONCE)
    await world.driver.act("toy", "abort", "labels swapped")
    assert (await world.look()).stage == "aborted" and world.answers() == {1}
    with pytest.raises(UnknownError):
        await world.driver.act("toy", "resume", "")
    second = await world.driver.start("toy", 2, AT_ONCE)
    assert second.rollout != first.rollout and second.stage == "canary"


async def test_what_is_not_on_the_ledger_is_not_rolled_out(world: World) -> None:
    with pytest.raises(UnknownError, match="version 9"):
        await world.driver.start("toy", 9, AT_ONCE)
    with pytest.raises(UnknownError):
        await world.driver.start("nothing", None, AT_ONCE)
