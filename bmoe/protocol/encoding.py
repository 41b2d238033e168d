"""Deterministic CBOR: one spelling for every value, and nothing else accepted.

Source: RFC 8949, section 4.2.1. We use a subset in which the two historic map orders coincide: map keys are the
integers 0..23, values are integers, byte strings, text, booleans, arrays and such maps. No floats (two versions of
one library spell them differently), no tags, no indefinite lengths, no duplicate keys.
"""

from __future__ import annotations

from typing import Any

import cbor2

from bmoe.protocol.errors import EncodingError

MAX_DEPTH = 6
MAX_HEADER_BYTES = 256 * 1024


def encode(value: Any) -> bytes:
    """The one spelling of `value`; maps must already have integer keys 0..23 in ascending order.

    Raises EncodingError for what CBOR cannot hold, such as text with a lone surrogate (an undecodable file name).
    """
    try:
        return cbor2.dumps(value)
    except (cbor2.CBOREncodeError, ValueError, TypeError, OverflowError) as error:
        raise EncodingError(f"cannot be encoded: {error}") from error


def decode(data: bytes, max_bytes: int = MAX_HEADER_BYTES) -> Any:
    """The value of one complete item, arrays as tuples; raises EncodingError for anything not spelled our one way."""
    if len(data) > max_bytes:
        raise EncodingError(f"header of {len(data)} bytes exceeds the cap of {max_bytes}")
    try:
        value = cbor2.loads(
            data,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            semantic_decoders=_NO_TAGS,
            immutable=False,
        )
    except EncodingError:
        raise
    except (cbor2.CBORDecodeError, ValueError, OverflowError, TypeError, MemoryError) as error:
        # Without the library's own words: leaves of the ledger quote this, and each validator has its own version.
        raise EncodingError(f"not well-formed CBOR of at most depth {MAX_DEPTH}") from error
    value = _checked(value)
    if encode(value) != data:
        raise EncodingError("not in deterministic form: re-encoding gives other bytes")
    return value


def _refuse_tag(*_: Any) -> Any:
    raise EncodingError("CBOR tags are not accepted here")


_NO_TAGS = {tag: _refuse_tag for tag in (*range(0, 6), *range(25, 38), 43000, 100, 256, 258, 260, 261, 1004, 55799)}


_SCALARS = frozenset((int, bytes, str, bool))
_MAP_KEYS = frozenset(range(24))


def _checked(value: Any) -> Any:
    """The value with tuples for arrays; every signed byte passes here, so scalars are passed over without a call each."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list or kind is tuple:
        return tuple([item if type(item) in _SCALARS else _checked(item) for item in value])
    if kind is dict:
        # The types first: `True` and `1.0` are equal to the key 1.
        if any(type(key) is not int for key in value) or not _MAP_KEYS.issuperset(value):
            raise EncodingError("map keys must be integers 0..23")
        return {key: item if type(item := value[key]) in _SCALARS else _checked(item) for key in sorted(value)}
    raise EncodingError(f"a value of type {kind.__name__} is not accepted in a header")


def bstr(data: bytes) -> bytes:
    """A byte string item: its head and the bytes. Faster than cbor2 for large tensors, which it would copy twice."""
    return bstr_head(len(data)) + data


def bstr_head(length: int) -> bytes:
    """The head of a byte string of `length` bytes, in its shortest form."""
    if length < 24:
        return bytes((0x40 | length,))
    if length < 1 << 8:
        return bytes((0x58, length))
    if length < 1 << 16:
        return b"\x59" + length.to_bytes(2, "big")
    if length < 1 << 32:
        return b"\x5a" + length.to_bytes(4, "big")
    raise EncodingError(f"a byte string of {length} bytes exceeds 4 GiB")


# By initial byte: how many bytes of length follow, and the least length that needs so many.
_WIDTHS = {0x58: (1, 24), 0x59: (2, 1 << 8), 0x5A: (4, 1 << 16)}


def read_bstr(data: bytes, offset: int) -> tuple[bytes, int]:
    """The byte string item at `offset` and the offset behind it; raises EncodingError unless it is one, whole."""
    if offset >= len(data):
        raise EncodingError(f"expected a byte string at offset {offset}, found the end of {len(data)} bytes")
    head = data[offset]
    start = offset + 1
    if 0x40 <= head < 0x58:
        length = head - 0x40
    elif head in _WIDTHS:
        width, least = _WIDTHS[head]
        start += width
        length = int.from_bytes(data[offset + 1 : start], "big")
        if length < least or start > len(data):
            raise EncodingError(f"the length of the byte string at offset {offset} is not in its shortest form")
    else:
        raise EncodingError(f"expected a byte string at offset {offset}, found initial byte 0x{head:02x}")
    end = start + length
    if end > len(data):
        raise EncodingError(f"the byte string at offset {offset} needs {length} bytes, {len(data) - start} are left")
    return data[start:end], end


def read_bstrs(data: bytes, offset: int, count_max: int) -> tuple[bytes, ...]:
    """All byte string items from `offset` to the end; raises EncodingError beyond `count_max` of them."""
    items: list[bytes] = []
    while offset < len(data):
        if len(items) == count_max:
            raise EncodingError(f"more than {count_max} byte strings")
        item, offset = read_bstr(data, offset)
        items.append(item)
    return tuple(items)
