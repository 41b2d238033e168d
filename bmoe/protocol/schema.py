"""Typed headers: a frozen dataclass whose fields name their map key and their check.

One mechanism serves every signed message and every ledger entry, so that strictness is written once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from bmoe.protocol.encoding import decode, encode
from bmoe.protocol.errors import MessageError
from bmoe.protocol.text import is_plain

WIRE_VERSION = 1
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
Check = Callable[[Any], bool]
T = TypeVar("T", bound="Header")


def key(number: int, check: Check, expected: str) -> Any:
    """A dataclass field kept under map key `number`; `expected` is what an error says was wanted."""
    return dataclasses.field(metadata={"key": number, "check": check, "expected": expected})


def uint(number: int, limit: int = 2**53) -> Any:
    """An integer field in 0..limit."""
    return key(number, lambda v: type(v) is int and 0 <= v <= limit, f"an integer in 0..{limit}")


def octets(number: int, length: int) -> Any:
    """A byte string field of exactly `length` bytes."""
    return key(number, lambda v: type(v) is bytes and len(v) == length, f"{length} bytes")


def blob(number: int, limit: int) -> Any:
    """A byte string field of at most `limit` bytes."""
    return key(number, lambda v: type(v) is bytes and len(v) <= limit, f"at most {limit} bytes")


def text(number: int, limit: int = 200) -> Any:
    """A text field of at most `limit` characters, none of which does anything to a terminal or a log."""
    expected = f"text of at most {limit} characters and no control characters"
    return key(number, lambda v: type(v) is str and len(v) <= limit and is_plain(v), expected)


def name(number: int) -> Any:
    """A name: lower-case letters, digits and inner hyphens, 1..64 characters."""
    return key(number, is_name, "a name of 1..64 characters a-z 0-9 -")


def is_name(value: Any) -> bool:
    """Whether `value` may name a device, coordinator, validator, model or owner."""
    return type(value) is str and NAME_PATTERN.fullmatch(value) is not None


def array(number: int, item: Check, limit: int, expected: str) -> Any:
    """An array field of at most `limit` items that all pass `item`."""
    return key(
        number,
        lambda v: type(v) is tuple and len(v) <= limit and all(item(i) for i in v),
        f"at most {limit} of {expected}",
    )


def is_digest(value: Any) -> bool:
    """Whether `value` is a SHA-256 digest."""
    return type(value) is bytes and len(value) == 32


def is_uint(value: Any) -> bool:
    """Whether `value` is an integer that every peer's JSON can carry."""
    return type(value) is int and 0 <= value <= 2**53


def is_tensor_spec(value: Any) -> bool:
    """Whether `value` is (name, dtype, dims) as a header describes a tensor."""
    return (
        type(value) is tuple
        and len(value) == 3
        and type(value[0]) is str
        and 0 < len(value[0]) <= 128
        and is_plain(value[0])
        and type(value[1]) is str
        and len(value[1]) <= 16
        and type(value[2]) is tuple
        and len(value[2]) <= 8
        and all(type(d) is int and 0 <= d < 2**31 for d in value[2])
    )


def is_output_spec(value: Any) -> bool:
    """Whether `value` is a tensor spec with its tolerance behind it: 8 bytes, big-endian float64."""
    return (
        type(value) is tuple
        and len(value) == 4
        and is_tensor_spec(value[:3])
        and type(value[3]) is bytes
        and len(value[3]) == 8
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What every signed header carries: keys 0 wire version, 1 type, 2..5 the fields here."""

    TYPE: ClassVar[int]
    CONTEXT: ClassVar[str]

    ledger: bytes = octets(2, 16)
    epoch: int = uint(3)
    author: str = name(4)
    seq: int = uint(5)

    def to_bytes(self) -> bytes:
        """The header's one spelling."""
        cls = type(self)
        values: dict[int, Any] = {0: WIRE_VERSION, 1: cls.TYPE}
        for number, attribute in _table(cls).keys:
            values[number] = getattr(self, attribute)
        return encode(values)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A header type's fields in key order, looked up once: (key, attribute, check, what is expected)."""

    rows: tuple[tuple[int, str, Check, str], ...]
    keys: tuple[tuple[int, str], ...]
    allowed: frozenset[int]


_TABLES: dict[type, _Table] = {}


def _table(cls: type) -> _Table:
    table = _TABLES.get(cls)
    if table is None:
        fields = sorted(dataclasses.fields(cls), key=lambda f: f.metadata["key"])
        rows = tuple((f.metadata["key"], f.name, f.metadata["check"], f.metadata["expected"]) for f in fields)
        keys = tuple((number, attribute) for number, attribute, _, _ in rows)
        table = _TABLES[cls] = _Table(rows, keys, frozenset({0, 1, *(number for number, _ in keys)}))
    return table


def header_type(values: Any) -> int:
    """The message type of a decoded header map; raises MessageError unless its wire version is ours."""
    found = values.get(0) if type(values) is dict else type(values).__name__
    # `True == 1`, so the type is asked too: the version has one spelling like everything else.
    if type(found) is not int or found != WIRE_VERSION:
        raise MessageError(f"wire version must be {WIRE_VERSION}, found {found!a}")
    kind = values.get(1)
    if type(kind) is not int:
        raise MessageError("the header names no message type")
    return kind


def from_map(cls: type[T], values: dict[int, Any]) -> T:
    """A typed header from its decoded map; raises MessageError naming the field, what was expected and what came."""
    kind = header_type(values)
    if kind != cls.TYPE:
        raise MessageError(f"expected a {cls.CONTEXT} (type {cls.TYPE}), found type {kind}")
    table = _table(cls)
    if not table.allowed.issuperset(values):
        raise MessageError(f"{cls.CONTEXT} has unknown keys {sorted(set(values) - table.allowed)}")
    arguments = {}
    for number, attribute, check, expected in table.rows:
        value = values.get(number)
        if value is None or not check(value):
            raise MessageError(f"{cls.CONTEXT}.{attribute} must be {expected}, found {_short(value)}")
        arguments[attribute] = value
    # Past the frozen __init__, which sets each field through a call of its own: no header type has a __post_init__.
    header = object.__new__(cls)
    header.__dict__.update(arguments)
    return header


def from_bytes(cls: type[T], data: bytes) -> T:
    """A typed header from its bytes; raises EncodingError or MessageError."""
    return from_map(cls, decode(data))


def _short(value: Any) -> str:
    shown = ascii(value)  # not repr: what it escapes differs between versions of Python, and leaves quote this
    return shown if len(shown) <= 80 else shown[:77] + "..."
