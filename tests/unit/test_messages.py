"""Signed headers are strict: a field that is missing, strange or out of range is named, with what came."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.encoding import decode, encode
from bmoe.protocol.envelope import seal
from bmoe.protocol.errors import EncodingError, EnvelopeError, MessageError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import (
    MAX_ATTACHMENT_BYTES,
    MESSAGES,
    REFUSALS,
    FrameHeader,
    Health,
    Output,
    Refusal,
    Release,
    Status,
    Task,
    open_message,
    seal_message,
    tensor_specs,
    tensors_from,
)
from bmoe.protocol.schema import from_bytes, from_map, is_name
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.text import plain

SIGNER = Signer.from_bytes(bytes([3] * 32))
COMMON: dict[str, Any] = {"ledger": bytes(16), "epoch": 1, "author": "agent-1", "seq": 1}
REFUSAL = Refusal(**COMMON, task=bytes(16), reason="busy", detail="")
EPSILON = struct.pack(">d", 1e-5)
RELEASE = Release(
    **{**COMMON, "author": "registrar"}, model="toy", expert_name="a", digest=bytes(32), size=1, opset=17, memory_mb=1,
    batch=True, inputs=(("x", "float32", (0, 2)),), outputs=(("y", "float32", (0, 2), EPSILON),), owner="ada",
    issued_ms=1,
)  # fmt: skip


def _map(header: Any) -> dict[int, Any]:
    return dict(decode(header.to_bytes()))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (0, 2, "wire version must be 1, found 2"),
        (0, True, "wire version must be 1, found True"),
        (1, 2, r"expected a bmoe/refusal/v1 \(type 3\), found type 2"),
        (1, True, "names no message type"),
        (1, "3", "names no message type"),
        (2, bytes(15), "ledger must be 16 bytes"),
        (3, -1, "epoch must be an integer in 0..9007199254740992, found -1"),
        (3, True, "epoch must be an integer"),
        (5, 2**53 + 1, "seq must be an integer"),
        (4, "Agent", "author must be a name"),
        (4, "", "author must be a name"),
        (6, "0" * 16, "task must be 16 bytes"),
        (7, "bored", "reason must be one of busy, expired"),
        (7, ("busy",), "reason must be one of"),
        (8, "x" * 201, "detail must be text of at most 200 characters"),
        (8, b"x", "detail must be text"),
        (9, 0, r"has unknown keys \[9\]"),
        (23, 0, r"has unknown keys \[23\]"),
    ],
)
def test_one_wrong_field_is_named_with_what_was_expected(key: int, value: Any, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        from_bytes(Refusal, encode(dict(sorted({**_map(REFUSAL), key: value}.items()))))


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_no_field_of_any_message_may_be_left_out(kind: int) -> None:
    cls = MESSAGES[kind]
    for field in dataclasses.fields(cls):
        with pytest.raises(MessageError):
            from_map(cls, {0: 1, 1: kind, field.metadata["key"]: None})
    numbers = [f.metadata["key"] for f in dataclasses.fields(cls)]
    assert len(set(numbers)) == len(numbers) and not {0, 1} & set(numbers) and max(numbers) <= 23


@pytest.mark.parametrize("data", [b"\x80", b"\x00", b"\xa0", b"\x61x", b"\xa1\x00\x01"])
def test_what_is_no_header_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        from_bytes(Refusal, data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs", ((1, 2, 3),)),
        ("inputs", (("x", "float32", (0, -1)),)),
        ("inputs", (("x", "float32", (1,) * 9),)),
        ("inputs", (("", "float32", ()),)),
        ("inputs", (("x" * 129, "float32", ()),)),
        ("outputs", (("y", "float32", (0, 2)),)),
        ("outputs", (("y", "float32", (0, 2), 5),)),
        ("outputs", (("y", "float32", (0, 2), "8letters"),)),
        ("outputs", (("y", "float32", (0, 2), EPSILON[:7]),)),
        ("outputs", (("y", "float32", 2, EPSILON),)),
        ("outputs", (("y", "float32", (0, 2), EPSILON),) * 65),
        ("batch", 1),
    ],
)
def test_a_release_whose_tensors_are_not_tensors_never_reaches_the_rules(field: str, value: Any) -> None:
    """Rules unpack tolerances: what is not 8 bytes must not get so far."""
    with pytest.raises(MessageError, match=field):
        from_bytes(Release, dataclasses.replace(RELEASE, **{field: value}).to_bytes())


NAMES = [("a", True), ("agent-1", True), ("0", True), ("a" * 64, True), ("a" * 65, False), ("-a", False), ("a-", False)]
NAMES += [(n, False) for n in ("", "A", "a.b", "a b", "a/b", "a\n", "ä", "a\x00", "+", "#", "a_b")]


@pytest.mark.parametrize(("name", "good"), NAMES)
def test_names_are_safe_in_topics_files_and_terminals(name: str, good: bool) -> None:
    assert is_name(name) is good


@pytest.mark.parametrize("value", [None, 5, b"a", ("a",)])
def test_a_name_is_text(value: object) -> None:
    assert not is_name(value)


def test_health_and_status_hold_what_boards_can_tell() -> None:
    health = Health(
        **COMMON, time_ms=1, known=(), cpu_percent=0, temperature_mc=0, memory_free_mb=0, throttled=0, queued=0,
        answered=0, refused=0, unreported=0,
    )  # fmt: skip
    assert from_bytes(Health, health.to_bytes()) == health
    with pytest.raises(MessageError, match=r"cpu_percent must be an integer in 0\.\.100, found 101"):
        from_bytes(Health, dataclasses.replace(health, cpu_percent=101).to_bytes())
    with pytest.raises(MessageError, match="state must be one of online, stopping, lost"):
        from_map(Status, {0: 1, 1: 4, 2: bytes(16), 3: 1, 4: "a", 5: 1, 6: "away"})


def test_a_message_carries_its_parts_and_no_more() -> None:
    parts = [b"salt", b"", bytes(300)]
    data = seal_message(SIGNER, REFUSAL, parts)
    sealed = open_message(Refusal, data, parts_max=3)
    sealed.verify(SIGNER.public_key)
    assert sealed.parts == tuple(parts) and sealed.message() == data and sealed.header == REFUSAL
    with pytest.raises(EncodingError, match="more than 2 byte strings"):
        open_message(Refusal, data, parts_max=2)
    with pytest.raises(EncodingError):
        open_message(Refusal, data[:-1], parts_max=3)


def test_a_header_spelled_otherwise_is_refused_though_well_signed() -> None:
    """The signer itself cannot give one header two spellings."""
    spelled = REFUSAL.to_bytes()
    assert spelled[1:3] == b"\x00\x01"
    longer = spelled[:2] + b"\x18\x01" + spelled[3:]
    with pytest.raises(EncodingError, match="deterministic"):
        open_message(Refusal, seal(SIGNER, Refusal.CONTEXT.encode(), longer))


@given(st.sampled_from(REFUSALS), st.text(max_size=200).map(plain), st.integers(0, 2**53))
def test_headers_round_trip(reason: str, detail: str, seq: int) -> None:
    header = dataclasses.replace(REFUSAL, reason=reason, detail=detail, seq=seq)
    assert from_bytes(Refusal, header.to_bytes()) == header


@given(st.sampled_from([Task, Output, Refusal]), st.binary(max_size=120))
def test_a_signed_payload_of_garbage_raises_our_errors_only(cls: type, payload: bytes) -> None:
    with pytest.raises((EncodingError, MessageError)):
        open_message(cls, seal(SIGNER, cls.CONTEXT.encode(), payload))


def test_an_empty_message_is_refused() -> None:
    with pytest.raises(EnvelopeError):
        open_message(Task, b"")


def test_tensors_must_fit_their_description() -> None:
    tensor = Tensor("x", "int16", (3,), bytes(6))
    specs = tensor_specs([tensor])
    assert tensors_from(specs, [tensor.data]) == (tensor,)
    with pytest.raises(MessageError, match="describes 1 tensors, 2 came"):
        tensors_from(specs, [tensor.data, b""])
    with pytest.raises(MessageError, match="needs 6 bytes, got 5"):
        tensors_from(specs, [bytes(5)])
    with pytest.raises(MessageError, match="dtype 'complex64' is not one of"):
        tensors_from((("x", "complex64", (1,)),), [bytes(8)])


@pytest.mark.parametrize(
    ("attachment", "good"),
    [
        ((bytes(32), MAX_ATTACHMENT_BYTES, False), True),
        ((bytes(32), MAX_ATTACHMENT_BYTES + 1, False), False),
        ((bytes(32), -1, False), False),
        ((bytes(31), 1, False), False),
        ((bytes(32), 1, 0), False),
        ((bytes(32), 1), False),
    ],
)
def test_a_frame_cannot_make_its_readers_fetch_without_limit(attachment: Any, good: bool) -> None:
    frame = FrameHeader(**COMMON, previous=bytes(32), time_ms=1, entries=(), attachments=(attachment,))
    if good:
        assert from_bytes(FrameHeader, frame.to_bytes()) == frame
    else:
        with pytest.raises(MessageError, match="attachments must be"):
            from_bytes(FrameHeader, frame.to_bytes())


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[2J", "\x00", "\x7f", "\x9b1m", "\u202egpj", "a\u2028b", "\ufeff", "\u200b"]
)
def test_text_that_a_terminal_or_a_log_would_obey_is_refused_and_shown_harmless(text: str) -> None:
    with pytest.raises(MessageError, match="no control characters"):
        from_bytes(Refusal, dataclasses.replace(REFUSAL, detail=text).to_bytes())
    shown = plain(text)
    assert from_bytes(Refusal, dataclasses.replace(REFUSAL, detail=shown).to_bytes()).detail == shown
    assert len(plain(text * 300)) == 200


def test_text_in_any_script_is_taken() -> None:
    detail = "Temperatur 71 °C, Αθήνα, 東京, 🦀"
    assert plain(detail) == detail
    assert from_bytes(Refusal, dataclasses.replace(REFUSAL, detail=detail).to_bytes()).detail == detail
