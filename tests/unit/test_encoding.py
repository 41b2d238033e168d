"""Deterministic CBOR against the RFC's own examples, and against bytes made to break a decoder."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors import vectors

from bmoe.protocol.encoding import MAX_DEPTH, MAX_HEADER_BYTES, bstr, bstr_head, decode, encode, read_bstr, read_bstrs
from bmoe.protocol.errors import EncodingError, EnvelopeError, InputError, MessageError
from bmoe.protocol.messages import MESSAGES, Task, open_message
from bmoe.protocol.schema import from_bytes

INTEGERS = st.integers(-(2**64), 2**64 - 1)
LEAVES = st.one_of(INTEGERS, st.binary(max_size=40), st.text(max_size=20), st.booleans())
KEYS = st.integers(0, 23)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(KEYS, inner, max_size=5).map(lambda m: dict(sorted(m.items()))),
    ),
    max_leaves=12,
)


def _ours(value: Any) -> bool:
    """Whether a decoded RFC example lies in our subset, told from the value alone."""
    if type(value) in (int, bool, bytes, str):
        return True
    if type(value) is list:
        return all(_ours(v) for v in value)
    return type(value) is dict and all(type(k) is int and 0 <= k <= 23 and _ours(v) for k, v in value.items())


def test_every_example_of_rfc_8949_is_read_exactly_or_refused() -> None:
    accepted = refused = 0
    for example in json.loads(vectors("cbor/appendix_a.json").read_text()):
        data = bytes.fromhex(example["hex"])
        # Outside, whatever they mean: indefinite lengths (marked as no round trip), tags, floats and simple values.
        outside = not example["roundtrip"] or 0xC0 <= data[0] <= 0xDB or data[0] > 0xF5
        try:
            value = decode(data)
        except EncodingError:
            refused += 1
            assert outside or not _ours(cbor2.loads(data)), f"{example['hex']} is in our subset and was refused"
        else:
            accepted += 1
            assert not outside and encode(value) == data, example["hex"]
            if "decoded" in example:
                assert json.loads(json.dumps(value)) == example["decoded"], example["hex"]
    assert (accepted, refused) == (33, 49)


@given(VALUES)
def test_what_we_encode_we_read_back_the_same(value: Any) -> None:
    try:
        assert decode(encode(value)) == value
    except EncodingError as error:
        assert "depth" in str(error)


@pytest.mark.parametrize(
    ("story", "spelled"),
    [
        ("nothing", ""),
        ("a float", "fb3ff0000000000000"),
        ("a half float", "f93c00"),
        ("null", "f6"),
        ("undefined", "f7"),
        ("a simple value", "f0"),
        ("a date tag", "c074323031332d30332d32315432303a30343a30305a"),
        ("a bignum", "c249010000000000000000"),
        ("a shareable value", "d81c80"),
        ("a reference to itself", "d81c81d81d00"),
        ("a string reference", "d9010081d81900"),
        ("a decimal fraction", "c48221196ab3"),
        ("a set", "d9010280"),
        ("self-described CBOR", "d9d9f700"),
        ("a tag nobody knows", "d9270f00"),
        ("an indefinite array", "9f01ff"),
        ("an indefinite map", "bf0001ff"),
        ("indefinite bytes", "5f4101ff"),
        ("indefinite text", "7f6161ff"),
        ("a break out of place", "ff"),
        ("reserved head", "1c"),
        ("an integer longer than needed", "1817"),
        ("a length longer than needed", "580101"),
        ("an array head longer than needed", "980101"),
        ("a map head longer than needed", "b8010001"),
        ("keys out of order", "a201000000"),
        ("one key twice", "a200000000"),
        ("a text key", "a1616100"),
        ("key 24", "a1181800"),
        ("key -1", "a12000"),
        ("key true, which python takes for 1", "a1f500"),
        ("an array as key", "a18000"),
        ("a map as key", "a1a000"),
        ("text that is not UTF-8", "62c328"),
        ("a lone surrogate", "63eda080"),
        ("something behind the value", "0000"),
        ("half an array", "8201"),
    ],
)
def test_a_second_spelling_is_refused(story: str, spelled: str) -> None:
    with pytest.raises(EncodingError):
        decode(bytes.fromhex(spelled))


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb"])
@pytest.mark.parametrize("length", [2**32, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_is_a_lie_costs_no_memory(head: str, length: int) -> None:
    tracemalloc.start()
    with pytest.raises(EncodingError):
        decode(bytes.fromhex(head) + length.to_bytes(8, "big") + b"\x00" * 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("opening", [b"\x81", b"\xa1\x00", b"\x82\x00", b"\xd8\x1c\x81", b"\xc1"])
def test_a_depth_bomb_is_refused_and_not_felt(opening: bytes) -> None:
    with pytest.raises(EncodingError):
        decode((opening * MAX_HEADER_BYTES)[: MAX_HEADER_BYTES - 1] + b"\x00")
    assert decode(b"\x81" * MAX_DEPTH + b"\x00") and MAX_DEPTH == 6
    with pytest.raises(EncodingError, match="depth"):
        decode(b"\x81" * (MAX_DEPTH + 1) + b"\x00")


def test_a_header_over_the_cap_is_refused_unread() -> None:
    fits = bstr(bytes(MAX_HEADER_BYTES - 5))
    assert len(fits) == MAX_HEADER_BYTES and decode(fits)
    with pytest.raises(EncodingError, match="cap of 262144"):
        decode(fits + b"\x00")
    with pytest.raises(EncodingError, match="cap of 3"):
        decode(b"\x00" * 4, 3)


@given(st.binary(max_size=200))
def test_random_bytes_raise_one_kind_of_error(data: bytes) -> None:
    try:
        assert encode(decode(data)) == data
    except EncodingError:
        pass
    with pytest.raises(EnvelopeError):
        open_message(Task, data)


@given(st.sampled_from(sorted(MESSAGES)), st.integers(0, 2**32))
def test_a_spoiled_header_raises_our_errors_or_is_spelled_again_the_same(kind: int, seed: int) -> None:
    chance = random.Random(seed)
    body: dict[int, Any] = {0: 1, 1: kind, 2: bytes(16), 3: 1, 4: "a", 5: 1, 6: bytes(16), 7: "b", 8: "c", 9: bytes(32)}
    data = bytearray(encode(body))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data))
        change = chance.choice(["flip", "cut", "double"])
        if change == "flip":
            data[place] ^= 1 << chance.randrange(8)
        else:
            data[place:] = b"" if change == "cut" and place else data[place:] * 2
    try:
        taken = from_bytes(MESSAGES[kind], bytes(data))
    except (EncodingError, MessageError) as error:
        assert str(error)
    else:
        assert taken.to_bytes() == data, "what is taken is spelled in one way only"


def test_what_cbor_cannot_hold_is_our_error_too() -> None:
    for value in ("\udcff", object(), {0: object()}):
        with pytest.raises(EncodingError, match="cannot be encoded"):
            encode(value)


@given(st.integers(0, 2**32 - 1))
def test_byte_string_heads_are_those_of_cbor(length: int) -> None:
    assert bstr_head(length)[0] >> 5 == 2
    small = length % 70_000
    assert bstr(bytes(small)) == cbor2.dumps(bytes(small))


@given(st.lists(st.binary(max_size=300), max_size=6), st.binary(max_size=3))
def test_byte_strings_come_back_or_are_refused(items: list[bytes], tail: bytes) -> None:
    data = b"".join(map(bstr, items))
    assert read_bstrs(data, 0, len(items)) == tuple(items)
    if items:
        with pytest.raises(EncodingError, match="more than"):
            read_bstrs(data, 0, len(items) - 1)
    try:
        found = read_bstrs(data + tail, 0, 12)
        assert b"".join(map(bstr, found)) == data + tail
    except InputError:
        pass


def test_a_byte_string_is_read_whole_or_not_at_all() -> None:
    for spelled in ("", "60", "5f", "5b0000000000000001", "4200", "5800", "590001", "5a000000ff00", "5affffffff"):
        with pytest.raises(EncodingError):
            read_bstr(bytes.fromhex(spelled), 0)
    with pytest.raises(EncodingError, match="4 GiB"):
        bstr_head(1 << 32)
