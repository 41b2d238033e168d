"""The wave machine: what begins when, what goes back by itself, and what no order of events can bring about."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import InputError
from coordinator.rollout.health import KINDS, SAMPLES, Figures, Limits, Seen, harm, known_well, troubles
from coordinator.rollout.machine import (
    ENDED,
    UNDER_WAY,
    Facts,
    Progress,
    end,
    members,
    pause,
    resume,
    serving_share,
    step,
    waiting,
)
from coordinator.rollout.plan import Agent, Plan, check_met, first_wave, meets, open_now, parse_plan, second_wave

NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC
PLAN = Plan(canary_count=1, share=0.3, soak_s=60, install_s=600)


def seen(count: int = 1, each: int = 50, dissent: int = 0, failed: int = 0, seconds: float = 0.01) -> dict[str, Seen]:
    """What was seen of so many agents, `dissent` and `failed` of each one's calls."""
    times = deque([seconds] * (each - failed), maxlen=64)
    return {f"edge-{i:02d}": Seen(each, failed, each - failed, dissent, times) for i in range(count)}


def figures(agents: dict[str, Seen] | None = None, tasks: int = 50, **more: int) -> Figures:
    known: dict[str, int] = {"tasks": tasks, "requests": tasks, "rows": 100, "differing": 3, **more}
    return Figures(**known, agents=seen() if agents is None else agents)  # type: ignore[arg-type]


GOOD = figures()


def fleet(holding: int = 0, count: int = 10, **common: object) -> dict[str, Agent]:
    names = [f"edge-{i:02d}" for i in range(count)]
    return {n: Agent(n, owner=f"o{i}", holds=i < holding, **common) for i, n in enumerate(names)}  # type: ignore[arg-type]


OWNERS = {name: agent.owner for name, agent in fleet().items()}


def begun(stage: str = "canary", wave: int = 1, watched: float = 0.0, waited: float = 0.0) -> Progress:
    return Progress(stage, tuple(fleet(count=wave)), watched=watched, waited=waited)


def test_a_good_version_goes_through_canary_and_share_to_all() -> None:
    progress, found, holding = Progress("canary"), [], 0
    while not progress.ended:
        agents = fleet(holding)
        progress = step(progress, PLAN, Facts(NOON, agents, GOOD, GOOD, 30.0))
        wave = members(progress, agents)
        if (progress.stage, len(wave)) not in found:
            found.append((progress.stage, len(wave)))
        holding = len(wave)
    assert found == [("canary", 1), ("share", 3), ("all", 10), ("done", 10)]
    assert progress.reason == "10 of 10 agents hold it"


def test_the_next_wave_waits_for_the_agents_the_watch_and_enough_tasks() -> None:
    assert step(begun(), PLAN, Facts(NOON, fleet(0), GOOD, GOOD, 1.0)) == begun(waited=1.0)
    held = begun(watched=55.0)
    assert step(held, PLAN, Facts(NOON, fleet(1), GOOD, GOOD, 4.0)) == begun(watched=59.0)
    few = figures(seen(each=3), tasks=3)
    assert step(held, PLAN, Facts(NOON, fleet(1), few, GOOD, 5.0)).stage == "canary"
    assert step(held, PLAN, Facts(NOON, fleet(1), GOOD, GOOD, 5.0)).stage == "share"


def test_a_clock_that_is_set_moves_nothing() -> None:
    held = begun(watched=30.0)
    for time_s in (0.0, NOON + 10 * 365 * 86_400):
        assert step(held, PLAN, Facts(time_s, fleet(1), GOOD, GOOD, 1.0)) == begun(watched=31.0)
        assert step(begun(), PLAN, Facts(time_s, fleet(0), passed_s=1.0)) == begun(waited=1.0)


def test_tasks_that_only_the_referee_answered_are_no_judgement_of_the_agents() -> None:
    only_referee = figures({}, tasks=50)
    assert not known_well(only_referee, Limits()) and known_well(GOOD, Limits())
    assert known_well(replace(only_referee, own=False), Limits()), "no expert is new: there is nothing to wait for"


def test_an_agent_that_refuses_the_version_sends_it_back_with_the_reason() -> None:
    agents = fleet(0) | {"edge-00": Agent("edge-00", refused="self-test: output y differs")}
    back = step(begun(), PLAN, Facts(NOON, agents))
    assert back.stage == "rolled-back"
    assert back.reason == "canary: refused: edge-00 refuses it: self-test: output y differs"


def refusing(*names: str, wave: int, **limits: float) -> str:
    agents = fleet(0) | {name: replace(fleet()[name], refused="self-test: y differs") for name in names}
    plan = replace(PLAN, limits=Limits(**limits))  # type: ignore[arg-type]
    return step(begun("share", wave), plan, Facts(NOON, agents)).stage


def test_a_minority_that_refuses_stops_no_good_release() -> None:
    assert refusing("edge-01", wave=3) == "share"
    assert refusing("edge-01", "edge-02", wave=3) == "rolled-back"
    assert refusing("edge-01", wave=2) == "rolled-back", "of two nobody can tell which is right"
    assert refusing("edge-01", "edge-02", "edge-03", wave=10) == "share"
    assert refusing("edge-01", wave=10, minority=0) == "rolled-back", "an operator may take everybody's word"
    assert refusing("edge-09", wave=3) == "share", "it is not in the wave"


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (figures(seen(dissent=20)), "canary: dissent: 40 % of its outputs dissent, at most 5 % may"),
        (figures(seen(failed=20)), "canary: failures: 40 % of its calls go unanswered"),
        (figures(failed=9), "canary: failures: 18 % of its tasks end without a verdict"),
        (figures(seen(seconds=0.9)), "canary: latency: agents take 900 ms for it (95th percentile), 10 ms for"),
        (figures(differing=60), "canary: disagreement: 60 % of its answers differ"),
    ],
)
def test_a_version_that_does_harm_goes_back_and_says_which(new: Figures, words: str) -> None:
    back = step(begun(watched=10), PLAN, Facts(NOON, fleet(1), new, GOOD))
    assert back.stage == "rolled-back" and back.reason.startswith(words)
    assert back.reason.split(": ")[1] in KINDS


def test_a_handful_of_bad_tasks_is_no_judgement() -> None:
    assert harm(figures(seen(each=5, failed=5), tasks=5, failed=5), GOOD, Limits(tasks=20), OWNERS) == ""


def test_what_the_version_in_use_does_as_badly_is_not_held_against_the_new_one() -> None:
    bad = figures(seen(dissent=30, failed=20, seconds=0.9), failed=20)
    assert harm(bad, bad, Limits(), OWNERS) == ""


def test_a_board_that_is_bad_at_both_versions_is_no_fault_of_the_new_one() -> None:
    broken = seen(1, dissent=25, failed=10)
    used = figures(broken | dict(list(seen(10).items())[1:]))
    assert harm(figures(broken), used, Limits(), OWNERS) == ""


def test_a_minority_that_dissents_or_is_silent_or_slow_stops_no_good_release() -> None:
    for lies in ({"dissent": 50}, {"failed": 50}, {"seconds": 9.0}):
        griefed = figures(seen(4) | dict(list(seen(5, **lies).items())[4:]))  # type: ignore[arg-type]
        assert harm(griefed, figures(seen(5)), Limits(), OWNERS) == "", lies
        found = troubles(griefed, GOOD, {})
        assert set(found) <= {"edge-04"}
        half = figures(seen(2) | dict(list(seen(4, **lies).items())[2:]))  # type: ignore[arg-type]
        assert harm(half, figures(seen(4)), Limits(), OWNERS) != "", lies


def test_one_owner_with_many_boards_is_still_one_owner() -> None:
    owners = {f"edge-{i:02d}": f"o{min(i, 3)}" for i in range(10)}  # o3 has seven of ten
    griefed = figures(seen(3) | dict(list(seen(10, dissent=50).items())[3:]))
    assert harm(griefed, figures(seen(10)), Limits(), owners) == ""


def test_liars_that_dissent_from_the_version_in_use_hide_no_bad_release() -> None:
    used = figures(seen(4) | dict(list(seen(5, dissent=50).items())[4:]))
    assert harm(figures(seen(5, dissent=10)), used, Limits(), OWNERS).startswith("dissent: ")


def test_whoever_is_out_of_service_counts_for_nothing() -> None:
    griefed = figures(seen(1) | dict(list(seen(2, dissent=50).items())[1:]))
    assert harm(griefed, figures(seen(2)), Limits(), OWNERS) != ""
    assert harm(griefed, figures(seen(2)), Limits(), {"edge-00": "o0"}) == ""


def test_a_slow_board_is_measured_by_its_own_past() -> None:
    slow_board = seen(1, seconds=0.9)
    used = figures(slow_board | dict(list(seen(10).items())[1:]))
    assert harm(figures(slow_board), used, Limits(), OWNERS) == ""
    assert harm(figures(seen(1, seconds=4.0)), used, Limits(), OWNERS).startswith("latency: ")


def test_a_few_latencies_say_nothing() -> None:
    few = figures(seen(1, each=SAMPLES - 1, seconds=9.0))
    assert harm(few, GOOD, Limits(), OWNERS) == ""
    assert not known_well(few, Limits()), "and the wave waits for more"
    lonely = figures(seen(1, each=2))
    assert harm(figures(seen(1, seconds=9.0)), lonely, Limits(), OWNERS) == "", "nor of the version in use"


def test_agents_that_are_away_hold_up_nobody() -> None:
    agents = fleet(2, 3) | {"edge-02": Agent("edge-02", online=False)}
    assert step(begun("share", 3, watched=60), PLAN, Facts(NOON, agents, GOOD, GOOD, 1.0)).stage == "all"


def test_a_wave_that_nobody_installs_goes_back_and_one_that_some_install_goes_on() -> None:
    late = begun(wave=2, waited=600)
    back = step(late, PLAN, Facts(NOON, fleet(0), GOOD, GOOD, 1.0))
    assert back.reason == "canary: not-installed: no agent of the wave has it after 600 s"
    assert step(late, PLAN, Facts(NOON, fleet(1), GOOD, GOOD, 1.0)).watched == 1.0


def test_a_wave_that_was_held_does_not_go_back_because_its_agents_are_away_or_not_heard_yet() -> None:
    """As after a restart of the coordinator, an hour into the wave."""
    held = begun(wave=2, waited=3600, watched=1800)
    for agents in (fleet(0), fleet(2, online=False), {}):
        assert step(held, PLAN, Facts(NOON, agents, GOOD, GOOD, 1.0)).stage == "canary"


def test_no_wave_begins_outside_of_the_window_and_a_rollback_waits_for_none() -> None:
    plan = replace(PLAN, windows=("22:00-04:30",))
    held = begun(watched=60)
    assert step(held, plan, Facts(NOON + 3600, fleet(1), GOOD, GOOD)) == held
    assert step(held, plan, Facts(NOON + 10 * 3600, fleet(1), GOOD, GOOD)).stage == "share"
    bad = figures(failed=50)
    assert step(held, plan, Facts(NOON + 3600, fleet(1), bad, GOOD)).stage == "rolled-back"
    assert step(Progress("canary"), plan, Facts(NOON, fleet())) == Progress("canary")
    assert step(begun(), plan, Facts(NOON, fleet(0), passed_s=5.0)) == begun(), "by day nobody installs: nobody is late"


def test_whoever_joins_while_it_goes_to_all_gets_it_too_and_whoever_was_revoked_is_not_waited_for() -> None:
    agents = fleet(3, 4) | {"edge-03": Agent("edge-03"), "edge-02": Agent("edge-02", fit=False)}
    everyone = begun("all", 2, watched=60)
    assert members(everyone, agents) == ["edge-00", "edge-01", "edge-03"]
    assert step(everyone, PLAN, Facts(NOON, agents, GOOD, GOOD, 1.0)).stage == "all"
    agents["edge-03"] = Agent("edge-03", holds=True)
    assert step(everyone, PLAN, Facts(NOON, agents, GOOD, GOOD, 1.0)).reason == "3 of 3 agents hold it"


def test_it_says_what_it_waits_for() -> None:
    plan = replace(PLAN, canary=("label:lab",), windows=("22:00-04:30",))

    def said(progress: Progress, agents: dict[str, Agent], new: Figures = GOOD, plan: Plan = PLAN) -> str:
        return waiting(progress, plan, Facts(NOON, agents, new))

    assert said(Progress("canary"), {}, plan=plan) == "its window, 22:00-04:30 UTC"
    assert "meets label:lab" in said(Progress("canary"), {}, plan=replace(plan, windows=()))
    assert said(begun(wave=3), fleet(1)) == "2 of 3 agents to install it"
    assert said(begun(wave=3), fleet(1, online=False)) == "an agent of the wave to be online and in service"
    assert said(begun(watched=20), fleet(1)) == "40 s more of watching"
    assert said(begun(watched=60), fleet(1), figures(tasks=3)).startswith("tasks: 3 seen, 20 needed")
    assert said(begun(watched=60), fleet(1), plan=plan) == "its window, 22:00-04:30 UTC"
    assert said(pause(begun(), ""), fleet()) == ""


def test_windows_may_run_past_midnight() -> None:
    assert [open_now(("22:00-04:30",), NOON + 3600 * h) for h in (0, 9.9, 10, 12, 16.4, 16.5)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert open_now((), NOON) and open_now(("12:00-12:00",), NOON + 7)


def test_a_pause_keeps_the_wave_and_a_resume_watches_it_anew() -> None:
    held = begun("share", 3, watched=50)
    paused = pause(held, "by the operator")
    assert (paused.stage, paused.wave) == ("paused", held.wave)
    assert step(paused, PLAN, Facts(NOON + 9e6, fleet(10), figures(failed=50), GOOD, 5.0)) == paused
    assert resume(paused) == Progress("share", held.wave, before="share")
    assert resume(Progress("paused")) == Progress("paused"), "what never began is not resumed"


def test_canaries_are_chosen_by_board_label_owner_or_name() -> None:
    agents = [
        Agent("a", board="Raspberry Pi 5 Model B"), Agent("b", label="lab"), Agent("c", owner="alice"),
        Agent("d", board="Raspberry Pi 5 Model B", online=False), Agent("e", label="lab", fit=False),
    ]  # fmt: skip
    assert first_wave(Plan(canary=("board:raspberry pi 5", "label:lab")), agents) == ["a", "b"]
    assert first_wave(Plan(canary=("owner:alice", "name:a")), agents) == ["a", "c"]
    assert not meets(agents[0], ("label:raspberry",))
    with pytest.raises(InputError, match="no agent in service meets 'label:lap'; of label there are: lab"):
        check_met(Plan(canary=("owner:alice", "label:lap")), agents[:4])
    check_met(Plan(canary=("name:d",)), agents)


def test_a_wave_is_never_larger_than_an_entry_of_the_ledger() -> None:
    crowd = [Agent(f"{i:04d}".ljust(64, "x")) for i in range(3000)]
    assert len(first_wave(Plan(canary=("board:",) * 0, canary_count=1024), crowd)) == 15_000 // 66
    assert len(second_wave(Plan(share=1.0), [crowd[0].name], crowd)) == 15_000 // 66
    assert len(members(Progress("all", ("x",)), {a.name: a for a in crowd})) == 3000


def test_the_canaries_answer_nobody_then_the_share_grows_with_those_that_hold_it() -> None:
    assert serving_share(begun("canary"), fleet(5)) == 0
    assert serving_share(begun("share", 3), fleet(3)) == 0.3
    assert serving_share(begun("all", 10), fleet(10)) == 1
    assert serving_share(pause(begun("all", 10), ""), fleet(10)) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"canary": ["planet:mars"]}, {"canary": "board:x"}, {"windows": ["25:00-01:00"]}, {"share": 0},
        {"share": float("nan")}, {"soak_s": "60"}, {"speed": 9}, {"over": "pigeon"}, {"limits": {"dissent": -1.0}},
        {"limits": {"minority": 0.6}}, {"limits": {"tasks": 1.5}}, {"limits": {"speed": 1}}, {"limits": 3},
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(InputError):
        parse_plan(given)


def test_a_plan_survives_its_file() -> None:
    plan = Plan(("label:lab",), share=0.5, windows=("01:00-05:00",), limits=Limits(tasks=3))
    assert parse_plan(plan.to_json()) == plan


facts = st.builds(
    lambda t, states, tasks, failed, dissent, differing: Facts(
        NOON,
        {
            f"edge-{i:02d}": Agent(f"edge-{i:02d}", online=s[0], holds=s[1], fit=s[2], refused="no" * s[3])
            for i, s in enumerate(states)
        },
        figures({"edge-00": Seen(tasks, failed, tasks, dissent, deque([0.01] * SAMPLES))}, tasks, differing=differing),
        GOOD,
        t,
    ),
    st.floats(0, 1000),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0] * 9 + [1])), max_size=8),
    *[st.integers(0, 60)] * 4,
)
acts = st.one_of(facts, st.sampled_from(["pause", "resume", "abort"]))


@given(st.lists(acts, max_size=30))
def test_whatever_happens_waves_only_grow_and_an_end_is_an_end(events: list[Facts | str]) -> None:
    order = {stage: i for i, stage in enumerate((*UNDER_WAY, "done"))}
    progress = Progress("canary")
    for event in events:
        before = progress
        if event == "pause":
            progress = pause(progress, "operator")
        elif event == "resume":
            progress = resume(progress)
        elif event == "abort":
            progress = end(progress, "aborted", "operator")
        elif isinstance(event, Facts):
            progress = step(progress, PLAN, event)
            owners = {name: agent.owner for name, agent in event.agents.items() if agent.fit}
            if before.stage in UNDER_WAY:
                assert (progress.stage == "rolled-back") >= bool(harm(event.new, event.used, PLAN.limits, owners))
                if progress.stage in order:
                    assert 0 <= order[progress.stage] - order[before.stage] <= 1
                assert not progress.ended or waiting(progress, PLAN, event) == ""
        assert progress.wave[: len(before.wave)] == before.wave
        assert len(set(progress.wave)) == len(progress.wave)
        if before.stage in ENDED:
            assert progress == before
        if progress.stage in ENDED and progress != before:
            assert progress.reason and len(progress.reason) <= 200
