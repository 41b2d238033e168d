"""The driver of rollouts on a folded ledger: who is told and asked, which version answers, what a restart keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledger_fixtures import TOY
from rules_helpers import founded

from bmoe.ledger.rules.entries import Rollout, Withdrawal
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.state import Event
from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError, UnknownError
from bmoe.protocol.messages import Installed, ModelRelease
from coordinator.catalogue import Catalogue
from coordinator.counts import RequestCounts
from coordinator.fleet import Fleet
from coordinator.gateway import Gateway
from coordinator.jobs import Answered, Request, Result
from coordinator.metrics import METRICS
from coordinator.rollout.course import TURN_S
from coordinator.rollout.driver import Rollouts
from coordinator.rollout.health import Limits
from coordinator.rollout.history import History
from coordinator.rollout.plan import Plan
from coordinator.rollout.store import Plans

NEW = bytes(31) + b"\x07"
AT_ONCE = Plan(canary_count=1, share=0.5, soak_s=0.0, limits=Limits(tasks=0))


class World:
    """A ledger with version 1 of `toy` in use and version 2 published; a driver; what it had carried to whom."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.folder, self.final = founded(), folder, True
        self.stalled: BmoeError | None = None
        self.seq = 0
        self.ledger.enter("registrar", self.ledger.release(NEW, "toy-new"), self.ledger.model([NEW], version=2))
        self.fleet = Fleet(self.ledger.state, folder / "fleet.json")
        for agent in self.ledger.agents:
            self.fleet.of(agent).online = True
        self.driver = self.started()

    def started(self) -> Rollouts:
        """A driver as at the start of a coordinator."""
        self.brought: list[str] = []

        async def enter(fields: dict[str, Any]) -> None:
            if self.stalled is not None:
                raise self.stalled
            self.ledger.enter("coordinator", (Rollout, fields))

        async def trial(request: Any) -> Any:
            raise AssertionError("nothing is tried here")

        def spawn(work: Awaitable[None]) -> object:
            return asyncio.ensure_future(work)

        def final(version: ModelRelease) -> bool:
            return self.final

        catalogue, plans = Catalogue(self.ledger.state), Plans(self.folder / "rollouts.json")
        driver = Rollouts(self.ledger.state, self.fleet, catalogue, plans, enter, trial, spawn, 2, final)
        driver.carrier = self  # type: ignore[assignment]
        return driver

    def bring(self, rollout: Rollout, agents: list[str], over: str) -> None:
        self.brought = agents

    def away(self, rollout: bytes, agents: set[str]) -> None:
        pass

    def forget(self, rollout: bytes, agents: set[str] | None = None) -> None:
        if agents is None:
            self.brought = []

    async def look(self, times: int = 1) -> Rollout:
        """So many of the driver's looks; where the rollout stands then."""
        for _ in range(times):
            await self.driver.look("toy")
        return self.ledger.state.rollouts["toy"]

    @property
    def row(self) -> dict[str, Any]:
        """The rollout as operators see it."""
        (row,) = self.driver.table()
        return row

    async def share(self) -> None:
        """A rollout that has come to its share, and serves."""
        await self.driver.start("toy", 2, AT_ONCE)
        while (await self.look()).stage != "share" or not self.row["share"]:
            for agent in self.brought:
                self.says(agent, "installed")

    def says(self, agent: str, state: str, reason: str = "", seq: int = 0) -> None:
        """An agent's word on the rollout."""
        rollout = self.ledger.state.rollouts["toy"].rollout
        self.seq += 1
        header = Installed(
            **self.ledger.common(agent, seq or self.seq), rollout=rollout, model="toy", version=2, state=state, reason=reason,
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
    await world.driver.start("toy", 2, replace(AT_ONCE, soak_s=3600.0))
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
    assert (entry.stage, entry.reason) == (
        "rolled-back",
        "canary: refused: agent-1 refuses it: self-test: y differs by 3",
    )
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


async def test_agents_that_are_away_for_days_hold_up_nobody_and_get_it_when_they_are_back(world: World) -> None:
    world.fleet.of("agent-5").online = False
    await world.driver.start("toy", 2, Plan(canary_count=5, share=1.0, soak_s=0.0, limits=Limits(tasks=0)))
    for _ in range(20):
        entry = await world.look()
        for agent in world.brought:
            world.says(agent, "installed")
        if entry.stage == "done":
            break
    await world.look()
    assert entry.reason == "4 of 5 agents hold it" and world.answers() == {2} and world.brought == []
    world.driver = world.started()  # nobody is asked again what he has said
    await world.look()
    assert world.brought == [] and len(world.row["holds"]) == 4
    world.fleet.of("agent-5").online = True
    await world.look()
    assert world.brought == ["agent-5"]
    world.says("agent-5", "failed", "metadata: the repository's metadata is out of date")
    await world.look()
    assert world.brought == ["agent-5"] and "out of date" in world.row["lacks"]["agent-5"]
    world.says("agent-5", "installed")
    await world.look()
    assert world.brought == [] and len(world.row["holds"]) == 5


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
    with pytest.raises(RefusedError, match="toy version 2 is the newest, and in use: publish another"):
        await world.driver.start("toy", None, AT_ONCE)
    assert world.answers() == {2}, "started once more by mistake, it took the version in use out of use"
    with pytest.raises(InputError, match="no agent in service meets 'label:lap'"):
        await world.driver.start("toy", 2, Plan(canary=("label:lap",)))
    assert "toy" not in world.ledger.state.rollouts
    world.ledger.enter("registrar", withdrawal(2, NEW))
    with pytest.raises(RefusedError, match="toy version 2 is withdrawn: wrong labels"):
        await world.driver.start("toy", 2, AT_ONCE)


def withdrawal(version: int, digest: bytes) -> Any:
    return Withdrawal, {"model": "toy", "version": version, "digests": (digest,), "reason": "wrong labels"}


async def test_a_version_withdrawn_while_it_is_rolled_out_answers_nobody_from_then_on(world: World) -> None:
    await world.share()
    assert world.answers() == {1, 2}
    world.ledger.enter("registrar", withdrawal(2, NEW))
    assert world.answers() == {1}, "before the driver has even looked"
    entry = await world.look()
    assert (entry.stage, entry.reason) == ("aborted", "withdrawn: wrong labels") and world.answers() == {1}


async def test_with_no_version_to_go_back_to_it_ends_and_says_what_to_do(world: World) -> None:
    await world.share()
    world.ledger.enter("registrar", withdrawal(1, TOY))
    entry = await world.look()
    assert entry.stage == "rolled-back" and "no-fallback" in entry.reason and "--serve" in entry.reason
    with pytest.raises(RefusedError, match="--serve"):
        await world.driver.start("toy", 2, AT_ONCE)


async def test_a_version_whose_entry_is_not_final_is_brought_to_nobody(world: World) -> None:
    world.final = False
    await world.driver.start("toy", 2, AT_ONCE)
    entry = await world.look(3)
    assert entry.wave == () and world.brought == [] and "final" in world.row["waits"]
    world.final = True
    assert (await world.look()).wave == ("agent-1",)


async def test_a_stalled_ledger_and_a_full_disk_stop_no_rollback(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.share()
    monkeypatch.setattr("coordinator.rollout.store.write_durably", full_disk)
    world.stalled = UnavailableError("the ledger engine is away")
    for agent in ("agent-1", "agent-2", "agent-3"):
        world.says(agent, "refused", "self-test: y differs by 3")
    entry = await world.look()
    assert entry.stage == "share" and world.answers() == {1}, "it still answered while the ledger was away"
    assert "the ledger engine is away" in world.row["stuck"]
    world.stalled = None
    assert (await world.look()).stage == "rolled-back" and world.row["stuck"] == ""


async def test_while_the_ledger_is_away_no_stage_is_skipped(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look()
    world.stalled = UnavailableError("the ledger engine is away")
    world.says("agent-1", "installed")
    for agent in ("agent-2", "agent-3"):
        await world.look(2)
        world.says(agent, "installed")
    world.stalled = None
    assert (await world.look()).stage == "share"


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


async def test_a_coordinator_killed_before_its_rollback_was_entered_enters_it_at_the_next_start(world: World) -> None:
    await world.share()
    world.stalled = UnavailableError("the ledger engine is away")
    world.says("agent-1", "refused", "self-test: y differs by 3")
    world.says("agent-2", "refused", "self-test: y differs by 3")
    await world.look()
    world.stalled, world.driver = None, world.started()
    entry = await world.look()
    assert entry.stage == "rolled-back" and "self-test: y differs by 3" in entry.reason


@pytest.mark.parametrize("stage", ["canary", "share", "all", "paused"])
async def test_a_coordinator_killed_in_any_stage_an_hour_into_the_wave_rolls_nothing_back(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    plan = Plan(canary_count=2, share=0.9, soak_s=3600.0, limits=Limits(tasks=0))
    await world.driver.start("toy", 2, plan)
    entry = await world.look()
    while entry.stage != ("share" if stage == "paused" else stage):
        for agent in world.brought:
            world.says(agent, "installed")
        course = world.driver._courses[entry.rollout]
        course.progress = replace(course.progress, watched=3600.0)
        entry = await world.look()
    if stage == "paused":
        await world.driver.act("toy", "pause", "")
    wave = world.ledger.state.rollouts["toy"].wave
    course = world.driver._courses[entry.rollout]
    course.progress = replace(course.progress, waited=3600.0, watched=max(1.0, course.progress.watched))
    await world.driver._keep_course(entry, course)
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    for agent in world.ledger.agents:  # nobody has said yet that it is there
        world.fleet.of(agent).online = False
    world.driver = world.started()
    entry = await world.look(3)
    assert (entry.stage, entry.wave) == (stage, wave)


async def test_the_driver_survives_a_fault_of_its_own_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    with monkeypatch.context() as patch:
        patch.setattr(world.driver, "_bring", lambda *_: 1 / 0)
        await world.look(2)
        assert "ZeroDivisionError" in world.row["stuck"]
    await world.look(2)
    assert world.row["stuck"] == "" and world.brought == ["agent-1"]


async def test_silent_agents_make_room_for_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.driver.start("toy", 2, Plan(canary_count=4, soak_s=0.0))
    await world.look(3)
    assert world.brought == ["agent-1", "agent-2"]
    now = time.monotonic() + TURN_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    await world.look()
    assert world.brought == ["agent-3", "agent-4"]


async def test_nobody_installs_outside_of_the_window(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    midnight = 1_800_014_400.0 + 12 * 3600
    monkeypatch.setattr(time, "time", lambda: midnight)
    await world.driver.start("toy", 2, replace(AT_ONCE, windows=("23:00-01:00",)))
    await world.look()
    assert world.brought == ["agent-1"]
    world.brought = []
    monkeypatch.setattr(time, "time", lambda: midnight + 3 * 3600)
    await world.look()
    assert world.brought == [] and world.row["waits"] == "1 of 1 agents to install it, in its window 23:00-01:00 UTC"


async def test_an_old_word_of_an_agent_does_not_come_back(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look()
    world.says("agent-1", "installed", seq=5)
    world.says("agent-1", "refused", "replayed by the broker", seq=4)
    assert (await world.look()).stage != "rolled-back"


async def test_an_expert_that_another_model_uses_as_well_stays_everybody_s(world: World) -> None:
    await world.driver.start("toy", 2, AT_ONCE)
    await world.look(2)
    assert world.asked(NEW) == set()
    other = replace(world.ledger.state.versions["toy", 2], model="other")
    world.ledger.state.models["other"] = other
    await world.look()
    assert len(world.asked(NEW)) == 5


async def test_after_a_rollback_the_version_is_given_to_nobody_new(world: World) -> None:
    await world.share()
    holders = world.asked(NEW)
    await world.driver.act("toy", "abort", "")
    await world.look()
    assert world.asked(NEW) == holders != set()


async def test_what_is_held_for_its_rollout_is_begun_by_start_and_not_by_resume(world: World) -> None:
    third = bytes(31) + b"\x09"
    held = {"rollout": bytes(16), "model": "toy", "version": 3, "wave": (), "stage": "paused", "reason": ""}
    entries = world.ledger.release(third, "toy-3"), world.ledger.model([third], version=3), (Rollout, held)
    world.ledger.enter("registrar", *entries)
    with pytest.raises(RefusedError, match="has not begun: bmoe rollout start"):
        await world.driver.act("toy", "resume", "")
    assert (await world.driver.start("toy", None, AT_ONCE)).version == 3


async def test_what_a_killed_coordinator_had_in_work_is_not_answered_by_a_version_that_was_stopped(
    world: World,
) -> None:
    await world.share()
    catalogue = Catalogue(world.ledger.state)
    given = [
        Request(bytes(16), "public", catalogue.version("toy", v), (), 1, "referee", "decided", "", 0) for v in (1, 2)
    ]
    assert [world.driver.again(request) for request in given] == given
    await world.driver.act("toy", "abort", "")
    assert [world.driver.again(request).model.statement.version for request in given] == [1, 1]


async def test_the_figures_tell_the_stage_the_agents_and_why_it_ended(world: World) -> None:
    history = History()

    def read(name: str) -> dict[tuple[str, ...], Any]:
        metric = next(metric for metric in METRICS if metric.name == f"bmoe_{name}")
        gateway = SimpleNamespace(rollouts=world.driver, rollouts_ended=history)
        return dict(metric.read(SimpleNamespace(gateway=gateway)))  # type: ignore[arg-type]

    await world.driver.start("toy", 2, Plan(canary_count=3, soak_s=0.0))
    await world.look()
    world.says("agent-1", "installed")
    world.says("agent-2", "failed", "the disk is full")
    await world.look()
    assert read("rollout_info") == {("toy", "2", "canary"): 1}
    agents = {("toy", "wanted"): 3, ("toy", "installed"): 1, ("toy", "failed"): 1}
    assert read("rollout_agents") == agents and read("rollout_serving_ratio") == {("toy",): 0}
    for agent in ("agent-2", "agent-3"):
        world.says(agent, "refused", "self-test: y differs")
    assert (await world.look(2)).stage == "rolled-back"
    history.on_applied(Applied((), (), (Event("rollout", {**vars(world.ledger.state.rollouts["toy"])}),)), 5)
    assert read("rollouts_ended_total") == {("rolled-back", "refused"): 1} and read("rollout_agents") == {}


async def test_what_clients_have_to_know_does_not_change_by_a_rollout(world: World) -> None:
    release = world.ledger.state.releases[NEW]
    renamed = replace(release, outputs=tuple(("z", *output[1:]) for output in release.outputs))
    world.ledger.state.releases[NEW] = renamed
    world.ledger.state.models["toy"] = world.ledger.state.versions["toy", 1]
    with pytest.raises(RefusedError, match=r"version 2 has .* -> z .*, version 1 in use has .* -> y .*with --serve"):
        await world.driver.start("toy", 2, AT_ONCE)


@pytest.mark.parametrize(
    "error", [InputError("x has 4 columns, 5 are declared"), UnavailableError("no verdict on task 00")]
)
async def test_a_request_that_the_new_version_cannot_answer_is_answered_by_the_one_in_use(
    world: World, error: BmoeError
) -> None:
    await world.share()
    versions: list[int] = []

    async def wait(name: str) -> None:
        pass

    async def infer(model: ReleasedModel, *_: object) -> Answered:
        versions.append(model.statement.version)
        if versions[-1] == 2:
            raise error
        request = Request(bytes(16), "public", model, (), 3, "referee", "decided", "", 0)
        return Answered(request, Result((), b"", b"", b"", b""), (), "decided", b"")

    gateway = Gateway.__new__(Gateway)
    gateway.catalogue, gateway.rollouts = Catalogue(world.ledger.state), world.driver
    gateway.counts = RequestCounts(gateway.catalogue.names)
    gateway.usable = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    gateway._infer = infer  # type: ignore[method-assign]
    world.driver._courses[world.ledger.state.rollouts["toy"].rollout].share = 1.0
    answered = await gateway.infer("toy", b"", "public")
    assert answered.request.model.statement.version == 1 and versions == [2, 1]
    new = world.driver._courses[world.ledger.state.rollouts["toy"].rollout].watch.of_new
    counted = (0, 0) if isinstance(error, UnavailableError) else (1, 3)
    assert (new.requests, new.differing) == counted, "what its tasks have told of already is not counted twice"
