"""Answers: the combination is recomputed, so a coordinator that bends weights, choices or values fences itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ledger_fixtures import TOY, Fleet, Kind, OpenTask, Signed, digest_of, tensor_of, toy
from rules_helpers import founded, kinds, openings, referee_decides, refused

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import BY_REFEREE
from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.outputs import opening_of
from bmoe.ledger.rules.state import TASK_WINDOW_MS
from bmoe.protocol.messages import tensor_specs

SECOND = bytes(31) + b"\x02"
SALT = bytes(16)


@dataclass
class Asked:
    """A fleet whose model weighs two experts, a verdict for each, and the true answer over them."""

    fleet: Fleet
    parts: list[tuple[OpenTask, Signed]]
    answer: Kind
    opening: bytes
    result: np.ndarray

    @property
    def attached(self) -> list[bytes]:
        return [self.opening, *openings([s for _, s in self.parts])]

    def bent(self, **changes: Any) -> Kind:
        return self.answer[0], {**self.answer[1], **changes}

    def with_result(self, y: np.ndarray, **changes: Any) -> tuple[Kind, bytes]:
        """The answer with another result, consistently committed to."""
        tensors = (tensor_of("y", y),)
        opening = opening_of(SALT, tensors)
        root = commit_rows("", SALT, tensors, 1)
        fields = {"outputs": tensor_specs(tensors), "result_root": root, "result_opening": digest_of(opening)}
        return self.bent(**fields, **changes), opening


def decided(fleet: Fleet, expert: bytes = TOY, shift: float = 0.0) -> tuple[OpenTask, Signed]:
    task = fleet.open_task(2, expert=expert)
    outputs = [fleet.output(a, task, toy(task.x) + shift, expert=expert) for a in fleet.agents[:3]]
    assert kinds(fleet.decide(task, outputs, expert=expert)) == ["verdict"]
    return task, outputs[0]


@pytest.fixture
def asked() -> Asked:
    fleet = founded()
    fleet.enter("registrar", fleet.release(SECOND, "toy-2"), fleet.model((TOY, SECOND), version=2, top_k=2))
    parts = [decided(fleet), decided(fleet, SECOND, 2.0)]
    return Asked(fleet, parts, *fleet.answer(parts, top_k=2))


def f4(*weights: float) -> bytes:
    return np.array(weights, "<f4").tobytes()


def u2(*numbers: int) -> bytes:
    return np.array(numbers, "<u2").tobytes()


def test_true_answer_is_entered_once(asked: Asked) -> None:
    fleet = asked.fleet
    applied = fleet.enter("coordinator", asked.answer, attachments=asked.attached)
    assert kinds(applied) == ["answer"]
    assert np.allclose(asked.result, toy(asked.parts[0][0].x)[:1] + 1, atol=1e-6)
    assert fleet.state.answers == {asked.answer[1]["request"]: fleet.state.time_ms + TASK_WINDOW_MS}
    refused(fleet, "coordinator", asked.answer, "has its answer already", attached=asked.attached)
    other, opening = asked.with_result(asked.result + 1)
    refused(fleet, "coordinator", other, "has its answer already", attached=[*asked.attached, opening])


@pytest.mark.parametrize("author", ["agent-1", "validator-1", "registrar"])
def test_only_a_coordinator_answers(asked: Asked, author: str) -> None:
    refused(asked.fleet, author, asked.answer, f"only a coordinator may enter this, not {author}")


BENT: dict[str, tuple[dict[str, Any], str]] = {
    "weights shifted to one expert": ({"weights": f4(0.9, 0.1)}, "not the combination"),
    "weights that make more of it": ({"weights": f4(0.9, 0.9)}, "sum to 1"),
    "a negative weight": ({"weights": f4(2, -1)}, "not negative"),
    "a weight that is no number": ({"weights": f4(np.nan, 1)}, "finite"),
    "weights for half the choices": ({"weights": f4(1)}, "packed choices"),
    "one expert twice": ({"experts": u2(0, 0), "task_index": u2(0, 0)}, "names an expert twice"),
    "experts exchanged": ({"experts": u2(1, 0)}, "not executed by the expert it names"),
    "tasks exchanged": ({"task_index": u2(1, 0)}, "not executed by the expert it names"),
    "an expert that the model has not": ({"experts": u2(0, 2)}, "not executed by the expert"),
    "a task that it does not list": ({"task_index": u2(0, 2)}, "not executed by the expert"),
    "another row of the batch": ({"task_rows": u2(1, 1)}, "not the combination"),
    "a row outside the batch": ({"task_rows": u2(0, 2)}, "points outside its tasks"),
    "an older version": ({"version": 1}, "takes 1 experts a row, the answer 2"),
    "a version unknown": ({"version": 3}, "version 3 with this gate is not released"),
    "a model unknown": ({"model": "oracle"}, "model oracle version 2"),
    "another gate": ({"gate": SECOND}, "with this gate is not released"),
    "fewer experts than the model asks": (
        {"top_k": 1, "experts": u2(0), "weights": f4(1), "task_index": u2(0), "task_rows": u2(0)},
        "takes 2 experts a row, the answer 1",
    ),
    "no row at all": (
        {"rows": 0, "experts": b"", "weights": b"", "task_index": b"", "task_rows": b"", "tasks": (), "openings": ()},
        "names each task once",
    ),
    "another result committed to": ({"result_root": bytes(32)}, "not what the entry commits to"),
    "a result not attached": ({"result_opening": bytes(32)}, "the result's opening"),
    "another name for the result": ({"outputs": (("z", "float32", (1, 3)),)}, "not the combination"),
    "another shape for the result": ({"outputs": (("y", "float32", (3, 1)),)}, "not the combination"),
    "an opening left out of the list": ({"openings": ()}, "with its opening"),
    "a value that was not accepted": ({"openings": (bytes(32), bytes(32))}, "accepted another value"),
}


@pytest.mark.parametrize("attack", BENT)
def test_bent_answer_fences_the_coordinator(asked: Asked, attack: str) -> None:
    changes, reason = BENT[attack]
    refused(asked.fleet, "coordinator", asked.bent(**changes), reason, attached=asked.attached, fences=True)
    assert not asked.fleet.state.answers


@pytest.mark.parametrize("y", [lambda r: r + np.float32(1e-6), lambda r: np.full_like(r, np.nan), lambda r: r[:, ::-1]])
def test_other_result_well_committed_is_still_not_the_combination(
    asked: Asked, y: Callable[[np.ndarray], np.ndarray]
) -> None:
    answer, opening = asked.with_result(np.ascontiguousarray(y(asked.result)))
    attached = [*asked.attached, opening]
    refused(asked.fleet, "coordinator", answer, "not the combination", attached=attached, fences=True)


def test_salt_of_the_result_is_sixteen_bytes_and_the_one_committed_with(asked: Asked) -> None:
    tensors = (tensor_of("y", asked.result),)
    opening = opening_of(bytes(16), tensors)
    assert opening != asked.opening
    answer = asked.bent(result_opening=digest_of(opening))
    attached = [*asked.attached, opening]
    refused(asked.fleet, "coordinator", answer, "not what the entry commits to", attached=attached, fences=True)


@pytest.mark.parametrize("salt", [b"", bytes(15), bytes(17)])
def test_result_without_a_whole_salt_fences(asked: Asked, salt: bytes) -> None:
    opening = opening_of(salt, (tensor_of("y", asked.result),))
    answer = asked.bent(result_opening=digest_of(opening))
    attached = [*asked.attached, opening]
    refused(asked.fleet, "coordinator", answer, "opening has no salt", attached=attached, fences=True)


def test_value_of_an_expert_withheld_fences(asked: Asked) -> None:
    attached = asked.attached[:-1]
    refused(asked.fleet, "coordinator", asked.answer, "is not attached", attached=attached, fences=True)


def test_few_bytes_cannot_name_an_answer_that_nobody_can_hold(asked: Asked) -> None:
    """A leaf has room for 700 rows that all name one row of a task; were that row large, memory would be gone."""
    rows = 700
    packed = {"experts": u2(0, 1), "weights": f4(0.5, 0.5), "task_index": u2(0, 1), "task_rows": u2(0, 0)}
    answer = asked.bent(rows=rows, **{name: data * rows for name, data in packed.items()})
    reason = "opening holds 12 bytes, the combination 8400"
    refused(asked.fleet, "coordinator", answer, reason, attached=asked.attached, fences=True)


def test_tasks_need_a_verdict_that_accepts_and_that_is_remembered(asked: Asked) -> None:
    fleet = asked.fleet
    open_task = fleet.open_task(2)
    tasks = (open_task.task, asked.parts[1][0].task)
    refused(fleet, "coordinator", asked.bent(tasks=tasks), "has no verdict", attached=asked.attached)


def test_undecided_task_gives_no_answer(asked: Asked) -> None:
    fleet = asked.fleet
    task = fleet.open_task(2)
    fleet.decide(task, [fleet.output("agent-1", task)], outcome="undecided")
    answer = asked.bent(tasks=(task.task, asked.parts[1][0].task))
    refused(fleet, "coordinator", answer, "has no accepting verdict", attached=asked.attached, fences=True)


def test_task_forgotten_gives_no_answer(asked: Asked) -> None:
    fleet = asked.fleet
    fleet.now_ms += TASK_WINDOW_MS + 1000
    fleet.tick("validator-1")
    # A stall or a suspended machine can make an honest answer this late: it is refused, and its author goes on.
    refused(fleet, "coordinator", asked.answer, "it is forgotten", attached=asked.attached)


def test_task_named_twice_gives_no_answer(asked: Asked) -> None:
    task, signed = asked.parts[0]
    changes = {"tasks": (task.task, task.task), "openings": (digest_of(signed.opening),) * 2}
    refused(
        asked.fleet, "coordinator", asked.bent(**changes), "names each task once", attached=asked.attached, fences=True
    )


def test_outvoted_value_does_not_pass_for_the_accepted_one(asked: Asked) -> None:
    fleet = asked.fleet
    task = fleet.open_task(2)
    lie = fleet.output("agent-1", task, toy(task.x) + 1)
    referee_decides(fleet, ["agent-2"], lie, task)
    (kind, fields), opening, _ = fleet.answer([(task, lie), asked.parts[1]], top_k=2)
    attached = [opening, lie.opening, asked.parts[1][1].opening]
    refused(fleet, "coordinator", (kind, fields), "accepted another value", attached=attached, fences=True)


def test_referees_value_is_what_a_disputed_task_answers_with(asked: Asked) -> None:
    fleet = asked.fleet
    task = fleet.open_task(2)
    lie = fleet.output("agent-1", task, toy(task.x) + 1)
    referee = referee_decides(fleet, [], lie, task, accepted=BY_REFEREE)[1]
    answer, opening, _ = fleet.answer([(task, referee), asked.parts[1]], top_k=2)
    attached = [opening, referee.opening, asked.parts[1][1].opening]
    assert kinds(fleet.enter("coordinator", answer, attachments=attached)) == ["answer"]


def test_replica_that_relies_on_validators_takes_the_answer_without_recomputing(asked: Asked) -> None:
    data = asked.fleet.frame("coordinator", asked.answer)
    assert kinds(apply_message(asked.fleet.state, data, recompute=False)) == ["answer"]
