"""Admission: every way in which a task message is not to be run, by its name, and who is never answered."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from agent_helpers import FREE, Gateway, now_ms, window

from bmoe.protocol.encoding import bstr
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Release, Task, open_message, seal_message
from bmoe.protocol.tensors import Tensor
from edge_agent.admit import Admitted, Ignored, Load, Refused, Repeated, admit, check_inputs
from edge_agent.outbox import AHEAD_MS

GATEWAY = Gateway()


def decide(message: bytes, load: Load = FREE, **rules: Any) -> Any:
    return admit(message, GATEWAY.rules(**rules), lambda task, size: load, now_ms())


def checked(message: bytes, **release: Any) -> Refused | None:
    """What checks 9 to 11 say of a message that passed 1 to 8."""
    admitted = decide(message)
    assert isinstance(admitted, Admitted)
    header = open_message(Release, GATEWAY.release(b"model", **release)).header
    return check_inputs(admitted, header, GATEWAY.rules())


def test_an_honest_task_is_admitted_with_its_inputs() -> None:
    admitted = decide(GATEWAY.task(rows=3))
    assert isinstance(admitted, Admitted)
    assert admitted.inputs == (window(3),)
    assert checked(GATEWAY.task(rows=3)) is None


STRANGER = Signer.generate()
UNANSWERED = {
    "too large": ("too-large", lambda: GATEWAY.task() + bytes(1 << 20)),
    "empty": ("malformed", lambda: b""),
    "noise": ("malformed", lambda: b"\xd2\x84" + bytes(100)),
    "cut short": ("malformed", lambda: GATEWAY.task()[:-1]),
    "bytes behind it": ("malformed", lambda: GATEWAY.task() + b"\x00"),
    "another message type": ("malformed", lambda: GATEWAY.release(b"model", signer=GATEWAY.coordinator)),
    "a stranger's key": ("unknown-signer", lambda: GATEWAY.task(signer=STRANGER)),
    "the registrar's key": ("unknown-signer", lambda: GATEWAY.task(signer=GATEWAY.registrar)),
    "another author's name": ("unknown-signer", lambda: GATEWAY.task(author="coordinator-2")),
    "a flipped bit": ("bad-signature", lambda: flipped(GATEWAY.task())),
    "another ledger": ("other-ledger", lambda: GATEWAY.task(ledger=bytes(16))),
    "another epoch": ("other-ledger", lambda: GATEWAY.task(epoch=1)),
    "somebody else's task": ("other-addressee", lambda: GATEWAY.task(agent="pi-2")),
}


def flipped(message: bytes) -> bytes:
    """The header's timeout changed after signing: 5000 becomes 5001."""
    at = message.index(bytes([14, 0x19]) + (5000).to_bytes(2, "big"))
    return message[: at + 3] + bytes([message[at + 3] ^ 1]) + message[at + 4 :]


@pytest.mark.parametrize("case", UNANSWERED)
def test_what_no_coordinator_of_ours_sent_to_us_is_never_answered(case: str) -> None:
    kind, make = UNANSWERED[case]
    decision = decide(make())
    assert isinstance(decision, Ignored) and decision.kind == kind, decision


def test_a_genuine_task_that_came_before_is_not_run_twice() -> None:
    message = GATEWAY.task(deadline_ms=1)  # late as well: who asks again gets the stored bytes all the same
    task = open_message(Task, message, 65).header.task
    assert decide(message, dataclasses.replace(FREE, answered=True)) == Repeated(task)
    in_work = decide(message, dataclasses.replace(FREE, in_work=True))
    assert isinstance(in_work, Ignored) and in_work.kind == "in-work"


def test_the_deadline_allows_for_a_clock_that_is_ahead_and_no_more() -> None:
    assert isinstance(decide(GATEWAY.task(deadline_ms=now_ms() - 1000)), Admitted)
    late = decide(GATEWAY.task(deadline_ms=now_ms() - 3000))
    assert isinstance(late, Refused) and late.reason == "expired"
    strict = decide(GATEWAY.task(deadline_ms=now_ms() - 1000), clock_tolerance_ms=0)
    assert isinstance(strict, Refused) and strict.reason == "expired"
    far = decide(GATEWAY.task(deadline_ms=now_ms() + AHEAD_MS + 60_000))
    assert isinstance(far, Refused) and "ahead of this board's clock" in far.detail


def test_a_task_that_may_be_answered_and_forgotten_is_refused_even_when_the_clock_went_back() -> None:
    deadline = now_ms() + 5000
    forgotten = decide(GATEWAY.task(deadline_ms=deadline), dataclasses.replace(FREE, floor_ms=deadline))
    assert isinstance(forgotten, Refused) and forgotten.reason == "expired"
    assert isinstance(
        decide(GATEWAY.task(deadline_ms=deadline), dataclasses.replace(FREE, floor_ms=deadline - 1)), Admitted
    )


def test_a_full_queue_says_busy() -> None:
    decision = decide(GATEWAY.task(), dataclasses.replace(FREE, room=False))
    assert isinstance(decision, Refused) and decision.reason == "busy"


BAD_AT_ONCE = {
    "no rows": lambda: GATEWAY.task(rows=0),
    "no parts": lambda: GATEWAY.task(parts=[]),
    "a tensor missing": lambda: GATEWAY.task(parts=[bytes(16)]),
    "a tensor cut short": lambda: GATEWAY.task(parts=[bytes(16), bytes(31)]),
    "an unknown dtype": lambda: spoiled_dtype(),
}


def spoiled_dtype() -> bytes:
    sealed = open_message(Task, GATEWAY.task(), 65)
    header = dataclasses.replace(sealed.header, inputs=(("x", "complex64", (2, 4)),))
    return seal_message(GATEWAY.coordinator, header, sealed.parts)


@pytest.mark.parametrize("case", BAD_AT_ONCE)
def test_a_coordinators_malformed_tensors_are_refused_as_bad_input(case: str) -> None:
    decision = decide(BAD_AT_ONCE[case]())
    assert isinstance(decision, Refused) and decision.reason == "bad-input", decision
    assert decision.detail


def other(name: str = "x", dtype: str = "float32", dims: tuple[int, ...] = (2, 4)) -> list[Tensor]:
    size = 4 if dtype == "float32" else 8
    count = 1
    for dim in dims:
        count *= dim
    return [Tensor(name, dtype, dims, struct.pack("<B", 0) * (size * count))]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (other(name="y"), "expected 'x' float32[2, 4], found 'y'"),
        (other(dtype="float64"), "found 'x' float64[2, 4]"),
        (other(dims=(2, 5)), "found 'x' float32[2, 5]"),
        (other(dims=(2, 4, 1)), "found 'x' float32[2, 4, 1]"),
        (other() + other(name="extra"), "expected 1 tensors, found 2"),
    ],
)
def test_tensors_that_the_release_does_not_declare_are_refused(inputs: list[Tensor], says: str) -> None:
    refused = checked(GATEWAY.task(inputs=inputs))
    assert refused is not None and refused.reason == "bad-input" and says in refused.detail


def test_inputs_that_are_not_the_committed_ones_are_refused() -> None:
    message = GATEWAY.task()
    swapped = message[:-1] + bytes([message[-1] ^ 1])  # the last byte of the last tensor, outside of the signature
    refused = checked(swapped)
    assert refused is not None and (refused.reason, "not those" in refused.detail) == ("bad-input", True)
    wrong_salt = open_message(Task, message, 65)
    resalted = wrong_salt.raw + seal_parts([bytes(16), *wrong_salt.parts[1:]])
    assert checked(resalted) is not None
    assert checked(wrong_salt.raw + seal_parts([b"", *wrong_salt.parts[1:]])) is not None, "a salt of no bytes"


def seal_parts(parts: list[bytes]) -> bytes:
    return b"".join(bstr(part) for part in parts)


def test_an_expert_too_large_for_this_board_or_without_batches_is_refused() -> None:
    large = checked(GATEWAY.task(), memory_mb=4096)
    assert large is not None and large.reason == "too-large" and "4096 MB" in large.detail
    single = checked(GATEWAY.task(rows=2), batch=False, inputs=(("x", "float32", (2, 4)),))
    assert single is not None and "one row at a time" in single.detail
