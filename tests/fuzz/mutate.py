"""Hostile bytes out of honest ones: flips, cuts, splices, false lengths, and odd values inside well-formed JSON or CBOR.

Plain functions of a `random.Random`, so that Hypothesis and the fuzzer spoil messages in the same ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import cbor2

from bmoe.protocol.envelope import split_envelope
from bmoe.protocol.errors import InputError

Mutate = Callable[[Random, bytes], bytes]

# What a length field might say, as a byte string of its width.
LENGTHS = [n.to_bytes(w, e) for w in (1, 2, 4, 8) for n in (0, 1, 2**7, 2 ** (8 * w) - 1) for e in ("big", "little")]
TEXTS = (
    "", "\x00", "a\nb", "\x1b[31m", "‮", "é" * 300, "x" * 5000, "-1", "1e999", "../../etc/passwd", "None", "true",
    "\ud800", "0" * 64, "A" * 43,
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2**15, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63))


def spoil(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four random faults."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice(FAULTS)(random, data, others or (data,))
    return data


def _flip(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = random.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1 << random.randrange(8),)) + data[at + 1 :]


def _cut(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    return data[:begin] + data[begin + random.choice((1, 1, 2, 8, 64)) :]


def _repeat(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    begin = random.randrange(len(data) + 1)
    piece = data[begin : begin + random.choice((1, 2, 16, 256))]
    return data[:begin] + piece * random.choice((1, 2, 50)) + data[begin:]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _length(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, lie = random.randrange(len(data) + 1), random.choice(LENGTHS)
    return data[:at] + lie + data[at + (len(lie) if random.random() < 0.7 else 0) :]


def _noise(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 3, 9))) + data[at:]


FAULTS = (_flip, _flip, _cut, _remove, _repeat, _splice, _length, _noise)


def odd(random: Random, floats: bool) -> Any:
    """A value that nobody expects."""
    kind = random.randrange(7)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        return random.choice(NUMBERS)
    if kind == 2:
        return random.choice((True, False))
    if kind == 3:
        return [odd(random, floats) for _ in range(random.randrange(3))]
    if kind == 4:
        return [[[[[[[[random.choice(NUMBERS)]]]]]]]]
    return random.choice((None, 1.5, 1e300, {}, {"a": 1})) if floats else random.choice((b"", b"\x00" * 31, {0: 1}))


def vary(random: Random, value: Any, floats: bool) -> Any:
    """The same tree with one place changed, taken out or given twice."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        changed = dict(value)
        fate = random.random()
        if fate < 0.1:
            del changed[key]
        elif fate < 0.2:
            changed[random.choice(list(value))] = value[key]
        elif fate < 0.25:
            changed[random.choice(TEXTS) if floats else random.randrange(30)] = value[key]
        else:
            changed[key] = vary(random, value[key], floats)
        return changed
    if isinstance(value, list | tuple) and value and random.random() < 0.85:
        items = list(value)
        at = random.randrange(len(items))
        fate = random.random()
        if fate < 0.1:
            del items[at]
        elif fate < 0.25:
            items.insert(at, items[at])
        else:
            items[at] = vary(random, items[at], floats)
        return items
    if isinstance(value, bytes) and random.random() < 0.5:
        return spoil(random, value)
    return odd(random, floats)


def spoil_json(random: Random, data: bytes) -> bytes:
    """A JSON text with an odd value, or with a key given twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    text = json.dumps(vary(random, value, floats=True))
    if random.random() < 0.1 and text.startswith("{"):
        text = text[:-1] + ", " + text[1:]
    return text.encode()


def spoil_cbor(random: Random, data: bytes) -> bytes:
    """A CBOR item with an odd value in it, spelled as we spell it."""
    try:
        return _spelled(vary(random, cbor2.loads(data), floats=False))
    except (cbor2.CBORDecodeError, cbor2.CBOREncodeError, ValueError, TypeError, OverflowError):
        return data


def spoil_message(random: Random, data: bytes) -> bytes:
    """A message whose header has an odd value; its signature is no longer good, which parsing does not ask."""
    try:
        envelope, end = split_envelope(data)
    except InputError:
        return data
    return replace(envelope, payload=spoil_cbor(random, envelope.payload)).encode() + data[end:]


def _spelled(value: Any) -> bytes:
    return cbor2.dumps(_sorted(value))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=lambda k: (str(type(k)), k))}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
