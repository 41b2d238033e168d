"""The wave machine: what begins when, what goes back by itself, and what no order of events can bring about."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import InputError
from coordinator.rollout.health import Figures, Limits, harm
from coordinator.rollout.machine import ENDED, UNDER_WAY, Facts, Progress, end, pause, resume, serving_share, step
from coordinator.rollout.plan import Agent, Plan, first_wave, meets, open_now, parse_plan

NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC
PLAN = Plan(canary_count=1, share=0.3, soak_s=60, install_s=600)
GOOD = Figures(tasks=50, outputs=100, seconds=(0.01,) * 50, rows=100, differing=3)


def fleet(holding: int = 0, count: int = 10, **common: object) -> dict[str, Agent]:
    names = [f"edge-{i:02d}" for i in range(count)]
    return {n: Agent(n, owner=f"o{i}", holds=i < holding, **common) for i, n in enumerate(names)}  # type: ignore[arg-type]


def begun(stage: str = "canary", wave: int = 1, held: float = 0.0) -> Progress:
    return Progress(stage, tuple(fleet(count=wave)), since=NOON, held=held)


def test_a_good_version_goes_through_canary_and_share_to_all() -> None:
    progress, seen, time_s, holding = Progress("canary"), [], NOON, 0
    while not progress.ended:
        progress = step(progress, PLAN, Facts(time_s, fleet(holding), GOOD, GOOD))
        if (progress.stage, len(progress.wave)) not in seen:
            seen.append((progress.stage, len(progress.wave)))
        holding, time_s = len(progress.wave), time_s + 30
    assert seen == [("canary", 1), ("share", 3), ("all", 10), ("done", 10)]


def test_the_next_wave_waits_for_the_agents_the_watch_and_enough_tasks() -> None:
    waiting = step(begun(), PLAN, Facts(NOON + 1, fleet(0), GOOD, GOOD))
    assert waiting == begun()
    held = step(begun(), PLAN, Facts(NOON + 5, fleet(1), GOOD, GOOD))
    assert held == begun(held=NOON + 5)
    assert step(held, PLAN, Facts(NOON + 64, fleet(1), GOOD, GOOD)) == held
    assert step(held, PLAN, Facts(NOON + 900, fleet(1), Figures(tasks=3), GOOD)) == held
    assert step(held, PLAN, Facts(NOON + 66, fleet(1), GOOD, GOOD)).stage == "share"


def test_an_agent_that_refuses_the_version_sends_it_back_with_the_reason() -> None:
    agents = fleet(0) | {"edge-00": Agent("edge-00", refused="self-test: output y differs")}
    back = step(begun(), PLAN, Facts(NOON + 1, agents))
    assert back.stage == "rolled-back" and back.reason == "canary: edge-00 refuses it: self-test: output y differs"


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (replace(GOOD, dissent=20), "outputs dissent"),
        (replace(GOOD, failed=9), "without a verdict"),
        (replace(GOOD, seconds=(0.9,) * 50), "agents take 900 ms"),
        (replace(GOOD, differing=60), "answers differ"),
    ],
)
def test_a_version_that_does_harm_goes_back_and_says_which(new: Figures, words: str) -> None:
    back = step(begun(held=NOON), PLAN, Facts(NOON + 10, fleet(1), new, GOOD))
    assert back.stage == "rolled-back" and words in back.reason


def test_a_handful_of_bad_tasks_is_no_judgement() -> None:
    assert harm(Figures(tasks=5, failed=5), GOOD, Limits(tasks=20)) == ""


def test_what_the_version_in_use_does_as_badly_is_not_held_against_the_new_one() -> None:
    bad = replace(GOOD, dissent=30, failed=20, seconds=(0.9,) * 50)
    assert harm(bad, bad, Limits()) == ""


def test_agents_that_are_away_hold_up_nobody() -> None:
    agents = fleet(2, 3) | {"edge-02": Agent("edge-02", online=False)}
    wave = replace(begun("share", 3), held=NOON)
    assert step(wave, PLAN, Facts(NOON + 61, agents, GOOD, GOOD)).stage == "all"


def test_a_wave_that_nobody_installs_goes_back_and_one_that_some_install_goes_on() -> None:
    late = NOON + 601
    assert step(begun(wave=2), PLAN, Facts(late, fleet(0), GOOD, GOOD)).stage == "rolled-back"
    assert step(begun(wave=2), PLAN, Facts(late, fleet(1), GOOD, GOOD)).held == late


def test_no_wave_begins_outside_of_the_window_and_a_rollback_waits_for_none() -> None:
    plan = replace(PLAN, windows=("22:00-04:30",))
    held = begun(held=NOON)
    assert step(held, plan, Facts(NOON + 3600, fleet(1), GOOD, GOOD)) == held
    assert step(held, plan, Facts(NOON + 10 * 3600, fleet(1), GOOD, GOOD)).stage == "share"
    assert step(held, plan, Facts(NOON + 3600, fleet(1), replace(GOOD, failed=50), GOOD)).stage == "rolled-back"
    assert step(Progress("canary"), plan, Facts(NOON, fleet())) == Progress("canary")


def test_windows_may_run_past_midnight() -> None:
    assert [open_now(("22:00-04:30",), NOON + 3600 * h) for h in (0, 9.9, 10, 12, 16.4, 16.5)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert open_now((), NOON) and open_now(("12:00-12:00",), NOON + 7)


def test_a_pause_keeps_the_wave_and_a_resume_watches_it_anew() -> None:
    held = begun("share", 3, held=NOON)
    paused = pause(held, "by the operator")
    assert (paused.stage, paused.wave) == ("paused", held.wave)
    assert step(paused, PLAN, Facts(NOON + 9999, fleet(10), replace(GOOD, failed=50), GOOD)) == paused
    assert resume(paused, NOON + 500) == Progress("share", held.wave, since=NOON + 500, before="share")


def test_canaries_are_chosen_by_board_label_owner_or_name() -> None:
    agents = [
        Agent("a", board="Raspberry Pi 5 Model B"), Agent("b", label="lab"), Agent("c", owner="alice"),
        Agent("d", board="Raspberry Pi 5 Model B", online=False), Agent("e", label="lab", fit=False),
    ]  # fmt: skip
    assert first_wave(Plan(canary=("board:raspberry pi 5", "label:lab")), agents) == ["a", "b"]
    assert first_wave(Plan(canary=("owner:alice", "name:a")), agents) == ["a", "c"]
    assert not meets(agents[0], ("label:raspberry",))


def test_the_canaries_answer_nobody_then_the_share_grows_with_those_that_hold_it() -> None:
    assert serving_share(begun("canary"), fleet(5)) == 0
    assert serving_share(begun("share", 3), fleet(3)) == 0.3
    assert serving_share(begun("all", 10), fleet(10)) == 1
    assert serving_share(pause(begun("all", 10), ""), fleet(10)) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"canary": ["planet:mars"]}, {"windows": ["25:00-01:00"]}, {"share": 0}, {"share": float("nan")}, {"soak_s": "60"},
        {"speed": 9}, {"limits": {"tasks": 1.5}}, {"limits": 3}, {"over": "pigeon"}, {"canary": "board:x"},
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
        NOON + t,
        {
            f"edge-{i:02d}": Agent(f"edge-{i:02d}", online=s[0], holds=s[1], fit=s[2], refused="no" * s[3])
            for i, s in enumerate(states)
        },
        Figures(tasks, failed, tasks, dissent, (0.01,), tasks, differing),
        GOOD,
    ),
    st.integers(0, 10**5),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0] * 9 + [1])), max_size=8),
    *[st.integers(0, 60)] * 4,
)
acts = st.one_of(facts, st.sampled_from(["pause", "resume", "abort"]))


@given(st.lists(acts, max_size=30))
def test_whatever_happens_waves_only_grow_and_an_end_is_an_end(events: list[Facts | str]) -> None:
    order = {stage: i for i, stage in enumerate((*UNDER_WAY, "done"))}
    progress, time_s = Progress("canary"), NOON
    for event in events:
        before = progress
        if event == "pause":
            progress = pause(progress, "operator")
        elif event == "resume":
            progress = resume(progress, time_s)
        elif event == "abort":
            progress = end(progress, "aborted", "operator")
        elif isinstance(event, Facts):
            time_s = max(time_s, event.time_s)
            progress = step(progress, PLAN, replace(event, time_s=time_s))
            bad = harm(event.new, event.used, PLAN.limits) or any(
                a.refused for n, a in event.agents.items() if n in before.wave
            )
            if before.stage in UNDER_WAY:
                assert (progress.stage == "rolled-back") >= bool(bad)
                if progress.stage in order:
                    assert 0 <= order[progress.stage] - order[before.stage] <= 1
        assert progress.wave[: len(before.wave)] == before.wave
        assert len(set(progress.wave)) == len(progress.wave)
        if before.stage in ENDED:
            assert progress == before
        if progress.stage in ENDED and progress != before:
            assert progress.reason and len(progress.reason) <= 200
