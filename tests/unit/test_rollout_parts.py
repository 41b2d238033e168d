"""What a rollout is made of: pieces that go on where an agent's copy ends, trials compared, plans that survive a crash."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.state import Event
from bmoe.protocol.messages import Update
from bmoe.protocol.tensors import Tensor
from coordinator.rollout.health import KINDS
from coordinator.rollout.history import History
from coordinator.rollout.machine import Progress
from coordinator.rollout.parcel import Parcel, pieces, sweep
from coordinator.rollout.plan import Plan
from coordinator.rollout.store import KEPT, Plans
from coordinator.rollout.trial import differing
from edge_agent.wanted import Result, Wanted, read_result, read_wanted, wanted_of, write_result, write_wanted

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=5)


def tensor(array: np.ndarray) -> Tensor:
    return Tensor("y", array.dtype.name, array.shape, array.tobytes())


# Pieces.


@given(SIZES, st.integers(5, 60), st.data())
def test_however_often_a_push_breaks_off_every_byte_is_sent_once_and_in_order(
    sizes: list[int], room: int, data: st.DataObject
) -> None:
    blobs = tuple((f"{i:064x}", size) for i, size in enumerate(sizes))
    parcel, have, sent = Parcel({}, blobs, Path("blobs")), {name: 0 for name, _ in blobs}, 0
    for attempt in range(100):
        found = pieces(parcel, have, room)
        if not found:
            break
        assert sum(int(str(length)) for *_, length in found) <= room
        # The updater stops at the first blob that is not whole: what stands behind it in a message would be lost.
        arrived = data.draw(st.integers(0 if attempt < 20 else 1, len(found)))
        for path, _, begin, length in found[:arrived]:
            name = str(path).removeprefix("blobs/")
            assert have[name] == begin
            have[name] += int(str(length))
            sent += int(str(length))
            if have[name] < dict(blobs)[name]:
                break
    assert have == dict(blobs) and sent == sum(sizes)


def test_the_small_files_travel_with_every_message(tmp_path: Path) -> None:
    (tmp_path / "timestamp").write_bytes(b"12345")
    parcel = Parcel({"metadata/timestamp.json": tmp_path / "timestamp"}, (("a" * 64, 10),), tmp_path)
    small = ["metadata/timestamp.json", str(tmp_path / "timestamp"), 0, 5]
    assert pieces(parcel, {})[0] == small and pieces(parcel, {"a" * 64: 10}) == [small]


def test_what_was_laid_out_for_a_rollout_that_ended_is_swept_away(tmp_path: Path) -> None:
    for name in ("aa", "bb"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "file").write_bytes(b"x")
    sweep(tmp_path / "out", {"bb"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bb"]
    sweep(tmp_path / "nothing", ())


# Trials.


def test_scores_differ_where_another_class_wins() -> None:
    used = tensor(np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float32))
    new = tensor(np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]], np.float32))
    assert differing([used], [new], 3) == 1


def test_numbers_differ_by_a_tenth_and_a_value_that_is_none_always() -> None:
    used = tensor(np.array([[1.0], [10.0], [0.0]], np.float32))
    assert differing([used], [tensor(np.array([[1.05], [12.0], [0.0]], np.float32))], 3) == 1
    assert differing([used], [tensor(np.array([[np.nan], [10.0], [0.0]], np.float32))], 3) == 1
    scores = tensor(np.array([[0.9, 0.1]], np.float32))
    assert differing([scores], [tensor(np.array([[np.nan, 0.1]], np.float32))], 1) == 1


def test_other_types_differ_when_they_are_not_equal_and_rows_count_once() -> None:
    used = [tensor(np.array([[1, 2], [3, 4]], np.int64)), tensor(np.array([[5], [6]], np.int64))]
    new = [tensor(np.array([[1, 9], [3, 4]], np.int64)), tensor(np.array([[9], [6]], np.int64))]
    assert differing(used, new, 2) == 1
    assert differing(used, [new[0], tensor(np.array([[9, 9], [6, 6]], np.int64))], 2) == 2


def test_only_the_rows_that_were_tried_are_compared() -> None:
    used = tensor(np.array([[1.0, 0.0]] * 8, np.float32))
    assert differing([used], [tensor(np.array([[0.0, 1.0]] * 3, np.float32))], 3) == 3


# What is kept.

ENTRY = Rollout(
    ledger=bytes(16), epoch=0, author="coordinator", seq=1, time_ms=5, rollout=b"r" * 16, model="toy", version=2,
    wave=("edge-01",), stage="share", reason="",
)  # fmt: skip


def test_a_driver_that_was_killed_goes_on_where_the_ledger_says(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.json"
    plans, plan = Plans(path), Plan(share=0.5, windows=("01:00-02:00",))
    kept = Progress("share", ("edge-01",), waited=7.0, watched=9.0, before="canary")
    plans.put(ENTRY.rollout, plan, kept, ["edge-01"])
    again = Plans(path)
    assert again.plan(ENTRY.rollout) == plan and again.progress(ENTRY) == kept
    assert again.holders(ENTRY.rollout) == ["edge-01"]
    moved = replace(ENTRY, stage="all")  # entered, and killed before it was kept
    assert again.progress(moved) == Progress("all", ("edge-01",))


@pytest.mark.parametrize(
    ("kept", "entered", "goes_on"),
    [
        ("rolled-back", "share", "rolled-back"), ("aborted", "canary", "aborted"), ("aborted", "paused", "aborted"),
        ("paused", "share", "paused"), ("all", "share", "all"), ("done", "all", "done"),
        ("canary", "share", "share"), ("all", "canary", "canary"), ("done", "share", "share"), ("share", "paused", "paused"),
    ],
)  # fmt: skip
def test_a_step_that_was_decided_and_never_entered_is_entered_at_the_next_start(
    tmp_path: Path, kept: str, entered: str, goes_on: str
) -> None:
    plans = Plans(tmp_path / "rollouts.json")
    plans.put(ENTRY.rollout, Plan(), Progress(kept, ("edge-01", "edge-02"), "why", before="share"))
    found = Plans(tmp_path / "rollouts.json").progress(replace(ENTRY, stage=entered))
    assert found.stage == goes_on
    other = replace(ENTRY, stage=entered, wave=("edge-09",))
    assert plans.progress(other).stage == entered, "of another wave it says nothing"


def test_of_many_rollouts_those_that_have_ended_are_forgotten_first(tmp_path: Path) -> None:
    plans = Plans(tmp_path / "rollouts.json")
    plans.put(ENTRY.rollout, Plan(share=0.7), Progress("share", ("edge-01",)))
    for i in range(KEPT + 5):
        plans.put(i.to_bytes(16, "big"), Plan(), Progress("done"))
    assert Plans(tmp_path / "rollouts.json").plan(ENTRY.rollout).share == 0.7


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"%s": {"plan": {"speed": 9}, "progress": 4}}' % (b"72" * 16),
    b'{"%s": {"progress": {"stage": "share", "wave": 7, "reason": "", "waited": 1e999, "watched": 0}}}' % (b"72" * 16),
])  # fmt: skip
def test_a_damaged_file_of_plans_costs_the_plan_and_not_the_rollout(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "rollouts.json"
    path.write_bytes(damaged)
    plans = Plans(path)
    with capture_logs() as logs:
        assert plans.plan(ENTRY.rollout) == plans.plan(ENTRY.rollout) == Plan()
    assert len(logs) <= 1, "it is asked for each second"
    assert plans.progress(ENTRY) == Progress("share", ("edge-01",))
    assert plans.holders(ENTRY.rollout) == []


# How they ended.


def test_every_end_is_counted_by_its_kind() -> None:
    history = History()
    ends = {
        ("done", "10 of 10 agents hold it"): "none", ("aborted", "labels swapped"): "operator",
        ("aborted", "withdrawn: wrong labels"): "withdrawn", ("rolled-back", "of another time"): "other",
        **{("rolled-back", f"canary: {kind}: as it is said"): kind for kind in KINDS},
    }  # fmt: skip
    for stage, reason in [*ends, ("canary", "")]:
        facts = {"rollout": b"r" * 16, "model": "toy", "version": 2, "stage": stage, "reason": reason}
        history.on_applied(Applied((), (), (Event("rollout", facts),)), 7)
    assert history.counts == Counter((stage, kind) for (stage, _), kind in ends.items())
    assert len(history.ends) == len(ends) and history.ends[0]["at"] == 7


UPDATE = Update(
    ledger=bytes(16), epoch=0, author="coordinator", seq=1, agent="edge-01", rollout=b"r" * 16, model="toy", version=2,
    digests=(b"d" * 32,), carrier="flower", superlink="192.0.2.7:9443", issued_ms=5,
)  # fmt: skip


def test_a_result_counts_for_the_rollout_that_it_is_of(tmp_path: Path) -> None:
    wanted = wanted_of(UPDATE)
    write_wanted(tmp_path, wanted)
    assert read_wanted(tmp_path) == wanted and read_result(tmp_path, wanted) is None
    write_result(tmp_path, Result(wanted.rollout, "refused", "self-test: y\x1b[2J differs"))
    found = read_result(tmp_path, wanted)
    assert found is not None and found.state == "refused" and "\x1b" not in found.reason
    assert read_result(tmp_path, Wanted(b"s" * 16, "toy", 3, (), "https", "")) is None


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b'{"rollout": "x", "state": "installed"}', b'{"rollout": 7}'])
def test_a_damaged_result_is_no_result(tmp_path: Path, damaged: bytes) -> None:
    wanted = wanted_of(UPDATE)
    write_wanted(tmp_path, wanted)
    (tmp_path / "updates" / "rollout" / "result.json").write_bytes(damaged)
    assert read_result(tmp_path, wanted) is None
