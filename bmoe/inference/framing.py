"""Frames between the runner and its worker: byte strings with their lengths in front, tensors as raw bytes.

A frame is kind (u8), count (u16), count lengths (u64), then the parts, all integers little-endian. A tensor is two
parts: its head as text, `float32 1,60 name`, and its row-major little-endian data. Standard library only: the parent
stays small.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bmoe.protocol.errors import BmoeError, InferenceError, InputError, ModelError

# Requests, and what follows in the frame.
LOAD = 1  # digest, path
RUN = 2  # digest, then the inputs
# Replies.
READY = 16  # the version of onnxruntime, and the execution provider that experts run on first
LOADED = 17  # nothing
ABSENT = 18  # nothing: the expert of a RUN is not loaded (any more); load it and ask again
WORN = 19  # nothing: it does not fit beside what other experts left behind; replace the worker and ask again
DONE = 20  # duration in microseconds (u64), provider, then the outputs
# Replies that are errors, each with its message.
ERRORS: dict[int, type[BmoeError]] = {32: ModelError, 33: InputError, 34: InferenceError}

HEAD = struct.Struct("<BH")
DURATION = struct.Struct("<Q")
MAX_PARTS = 512


def encode(kind: int, parts: Sequence[bytes]) -> list[bytes]:
    """A frame as the byte strings to write one after the other. Raises InputError over MAX_PARTS parts."""
    if len(parts) > MAX_PARTS:
        raise InputError(f"an expert has at most {MAX_PARTS // 2 - 1} tensors a side, got {len(parts) // 2}")
    return [HEAD.pack(kind, len(parts)), struct.pack(f"<{len(parts)}Q", *map(len, parts)), *parts]


def part_sizes(raw: bytes, limit: int) -> tuple[int, ...]:
    """The lengths announced by a frame. Raises ValueError if together they exceed `limit` bytes."""
    sizes = struct.unpack(f"<{len(raw) // 8}Q", raw)
    if sum(sizes) > limit:
        raise ValueError(f"a frame of {sum(sizes)} bytes exceeds the limit of {limit}")
    return sizes


def tensor_head(name: str, dtype: str, dims: Sequence[int]) -> bytes:
    """The text in front of a tensor's data."""
    # A name that is no Unicode text matches no expert's input; shown escaped in the error that says so.
    return f"{dtype} {','.join(map(str, dims))} {name}".encode(errors="backslashreplace")


def parse_tensor_head(head: bytes) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and dims. Raises ValueError where it is not such a text."""
    dtype, dims, name = head.decode().split(" ", 2)
    return name, dtype, tuple(int(dim) for dim in dims.split(",")) if dims else ()
