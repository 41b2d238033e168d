"""Golden pairs of strangers: whatever the archive or an array's header says, one clear error and bounded memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import pytest

from bmoe.protocol.errors import ManifestError
from bmoe.storage.golden import read_arrays

GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}"


def packed(data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("in.x.npy", data)
    return stream.getvalue()


def array(header: str, body: bytes = bytes(4)) -> bytes:
    """An .npy file of version 1.0 with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def test_the_frame_of_these_stories_is_a_good_one() -> None:
    assert read_arrays(packed(array(GOOD)))["in.x"].tolist() == [0.0]


@pytest.mark.parametrize(
    "header",
    ["{'descr': (", "(" * 900, "[" * 9000, GOOD.replace("(1,)", "(True,)"), GOOD.replace("(1,)", "(-1,)"), "", "\0"],
)
def test_a_header_that_is_none_is_refused(header: str) -> None:
    with pytest.raises(ManifestError):
        read_arrays(packed(array(header)))


def test_a_stream_that_does_not_unpack_is_refused() -> None:
    data = bytearray(packed(array(GOOD), zipfile.ZIP_DEFLATED))
    data[30 + len("in.x.npy")] = 0xFF  # a block of deflate of the kind that there is not
    with pytest.raises(ManifestError, match=r"not an \.npz file of plain arrays: Error -3"):
        read_arrays(bytes(data))


def test_a_method_of_packing_that_nobody_needs_is_refused() -> None:
    with pytest.raises(ManifestError, match="packed by method 14, expected deflate"):
        read_arrays(packed(array(GOOD), zipfile.ZIP_LZMA))


def test_a_bomb_that_states_a_small_size_is_not_unpacked() -> None:
    """200 KB that unpack to 100 MB, and say that they are 100 bytes."""
    data = bytearray(packed(bytes(100 << 20), zipfile.ZIP_DEFLATED))
    for place in (22, data.rindex(b"PK\x01\x02") + 24):  # APPNOTE 4.3.7 and 4.3.12
        data[place : place + 4] = (100).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError):
            read_arrays(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
