"""Protobuf's wire format, strictly and within bounds: the fields of one message, as offsets into the file.

Nothing is copied. Standard library only. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import NamedTuple

from bmoe.protocol.errors import ModelError

Data = bytes | mmap.mmap
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Each costs a step of Python: a file of a billion empty fields must not cost an hour.
MAX_FIELDS = 8_000_000


class Field(NamedTuple):
    """One field: its number, its wire type, a varint's value, and for BYTES where they lie."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class Wire:
    """A file and how many of its fields may still be read. All errors are ModelError, naming an offset."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._left = MAX_FIELDS

    def fields(self, start: int, end: int, runs: dict[int, re.Pattern[bytes]] | None = None) -> Iterator[Field]:
        """The fields of the message at `start`..`end`. Those whose tag byte stands in `runs` are passed over, all that
        the pattern matches at once."""
        position, data = start, self.data
        while position < end:
            if runs is not None and (run := runs.get(data[position])) is not None:
                found = run.match(data, position, end)
                if found is not None:
                    position = found.end()
                    continue
            self._left -= 1
            if self._left < 0:
                raise ModelError(f"more than {MAX_FIELDS} fields, which no model of this size needs")
            tag, position = self.varint(position, end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise ModelError(f"a field of number {number} before byte {position}: not an ONNX file, or damaged")
            if wire == BYTES:
                size, position = self.varint(position, end)
                if size > end - position:
                    raise ModelError(
                        f"a field at byte {position} claims {size} bytes, {end - position} are left: cut short?"
                    )
                yield Field(number, wire, 0, position, position + size)
                position += size
            elif wire == VARINT:
                value, position = self.varint(position, end)
                yield Field(number, wire, value, position, position)
            elif wire in (FIXED32, FIXED64):
                position += 4 if wire == FIXED32 else 8
                if position > end:
                    raise ModelError(f"a number at byte {position} reaches past the end of its message: cut short?")
                yield Field(number, wire, 0, position, position)
            else:
                raise ModelError(f"wire type {wire} before byte {position}: not an ONNX file, or damaged")

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """A base-128 number of at most 64 bits, and the position behind it."""
        value = shift = 0
        while position < end:
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, position
            shift += 7
            if shift > 63:
                raise ModelError(f"a number before byte {position} has more than 64 bits: not an ONNX file, or damaged")
        raise ModelError(f"the file ends within a number, at byte {position}: cut short?")

    def text(self, field: Field, limit: int = 1024) -> str:
        """A name; one that is no UTF-8, or too long, is refused."""
        if field.wire != BYTES or field.end - field.start > limit:
            raise ModelError(f"a name at byte {field.start} has {field.end - field.start} bytes, at most {limit} do")
        try:
            return bytes(self.data[field.start : field.end]).decode()
        except UnicodeDecodeError:
            raise ModelError(f"a name at byte {field.start} is no UTF-8 text") from None


def signed(value: int) -> int:
    """A varint as the int64 that it spells."""
    return value - (1 << 64) if value >= 1 << 63 else value
