"""The rule for answers: the combination is recomputed from the verdicts' accepted values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmoe.ledger.rules.combine import combine, unpack_choices
from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.entries import Answer
from bmoe.ledger.rules.state import TASK_WINDOW_MS, Context, Event, FalseEntryError, State
from bmoe.protocol.encoding import read_bstrs
from bmoe.protocol.errors import InputError, MessageError, RefusedError
from bmoe.protocol.messages import MAX_TENSORS, ModelRelease, Release, tensor_specs, tensors_from
from bmoe.protocol.tensors import Tensor


def answer(state: State, context: Context, entry: Answer) -> list[Event]:
    """Enter an answer whose verdicts all stand and whose value they give."""
    if state.role_of(entry.author) != "coordinator":
        raise RefusedError(f"only a coordinator may enter this, not {entry.author}")
    if entry.request in state.answers:
        raise RefusedError(f"request {entry.request.hex()} has its answer already")
    # Absence is no lie: a verdict may have been refused, or be too old to be answered from.
    missing = [task.hex() for task in entry.tasks if task not in state.closed]
    if missing:
        raise RefusedError(f"answer to {entry.request.hex()}: task {missing[0]} has no verdict, or it is forgotten")
    if context.recompute:
        try:
            check_answer(state, context.attachments, entry)
        except InputError as error:
            raise FalseEntryError(f"answer to {entry.request.hex()}: {error}") from error
    state.answers[entry.request] = state.time_ms + TASK_WINDOW_MS
    return [Event("answer", {"entry": entry, "index": state.size})]


def check_answer(state: State, attachments: dict[bytes, bytes], entry: Answer) -> None:
    """Recompute an answer; raises InputError saying what does not follow from the verdicts."""
    model = state.versions.get((entry.model, entry.version))
    if model is None or entry.gate != model.gate:
        raise MessageError(f"model {entry.model} version {entry.version} with this gate is not released")
    if not entry.tasks or len(entry.openings) != len(entry.tasks) or len(set(entry.tasks)) != len(entry.tasks):
        raise MessageError("an answer names each task once, with its opening")
    if entry.top_k != model.top_k:
        raise MessageError(f"model {entry.model} takes {model.top_k} experts a row, the answer {entry.top_k}")
    choices = unpack_choices(entry.rows, entry.top_k, entry.experts, entry.weights, entry.task_index, entry.task_rows)
    releases = [
        _release_of(state, entry, task, digest) for task, digest in zip(entry.tasks, entry.openings, strict=True)
    ]
    check_experts(model, entry, choices.experts.tolist(), choices.task_index.tolist(), releases)
    outputs = [
        accepted_tensors(attachments, digest, state.closed[task].specs)
        for task, digest in zip(entry.tasks, entry.openings, strict=True)
    ]
    check_size(attachments, entry, outputs, releases[0].batch)
    result = combine(model.combine, choices, outputs, releases[0].batch)
    check_result(attachments, entry, result)


def check_experts(
    model: ModelRelease, entry: Answer, experts: list[list[int]], tasks: list[list[int]], releases: list[Release]
) -> None:
    """Each choice's task must have been executed by the expert that the choice names; a row never names one twice."""
    for row_experts, row_tasks in zip(experts, tasks, strict=True):
        if len(set(row_experts)) != len(row_experts):
            raise MessageError("a row names an expert twice")
        for index, task in zip(row_experts, row_tasks, strict=True):
            if index >= len(model.experts) or task >= len(releases) or releases[task].digest != model.experts[index]:
                raise MessageError("a choice's task was not executed by the expert it names")


def accepted_tensors(attachments: dict[bytes, bytes], digest: bytes, specs: Sequence[Any]) -> tuple[Tensor, ...]:
    """A verdict's accepted value: the attachment whose digest the verdict fixed, as the accepted output describes it."""
    if digest not in attachments:
        raise MessageError(f"the opening {digest.hex()[:16]} is not attached")
    return tensors_from(specs, read_bstrs(attachments[digest], 0, MAX_TENSORS + 1)[1:])


def check_size(
    attachments: dict[bytes, bytes], entry: Answer, outputs: Sequence[tuple[Tensor, ...]], batch: bool
) -> None:
    """The result must be as large as the combination before that is made: 4096 rows may all name one huge row."""
    size = sum(entry.rows * len(t.data) // max(1, t.dims[0]) if batch and t.dims else len(t.data) for t in outputs[0])
    parts = read_bstrs(attachments.get(entry.result_opening, b""), 0, MAX_TENSORS + 1)
    found = sum(map(len, parts[1:]))
    if found != size:
        raise MessageError(f"the result's opening holds {found} bytes, the combination {size}")


def check_result(attachments: dict[bytes, bytes], entry: Answer, result: tuple[Tensor, ...]) -> None:
    """The result committed to must be the combination, byte for byte."""
    opening = attachments.get(entry.result_opening)
    if opening is None:
        raise MessageError("the result's opening is not attached")
    parts = read_bstrs(opening, 0, MAX_TENSORS + 1)
    if not parts or len(parts[0]) != SALT_BYTES:
        raise MessageError("the result's opening has no salt")
    if tensor_specs(result) != entry.outputs or tuple(t.data for t in result) != parts[1:]:
        raise MessageError("the result is not the combination of the verdicts' values")
    if commit_rows("", parts[0], result, entry.rows) != entry.result_root:
        raise MessageError("the result is not what the entry commits to")


def _release_of(state: State, entry: Answer, task: bytes, digest: bytes) -> Release:
    closed = state.closed.get(task)
    if closed is None or closed.outcome != "accepted":
        raise MessageError(f"task {task.hex()} has no accepting verdict")
    if closed.tenant != entry.tenant:
        raise MessageError(f"task {task.hex()} was of another tenant than {entry.tenant}")
    if closed.opening != digest:
        raise MessageError(f"task {task.hex()} accepted another value")
    return state.releases[closed.binding.expert]
