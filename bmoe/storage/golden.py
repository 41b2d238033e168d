"""Golden pairs: a known input and output of an expert, one .npz of arrays named `in.<tensor>` and `out.<tensor>`.

Read with care, for a stranger's manifest may name it: nothing pickled, nothing larger than the caps, however packed.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from math import prod

import numpy as np

from bmoe.protocol.errors import ManifestError
from bmoe.storage.manifest import DTYPES, MAX_TENSORS

Arrays = dict[str, np.ndarray]
MAX_BYTES = 256 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # so that equal arrays give equal files
# What zipfile, and numpy while it reads a header that is none, may raise.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError, OSError, RuntimeError, TypeError,
    SyntaxError, tokenize.TokenError, MemoryError,
)  # fmt: skip


def write_golden(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> bytes:
    """The file of a pair; numpy's own `load` reads it too."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for side, arrays in (("in", inputs), ("out", outputs)):
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{side}.{name}.npy", _DATE), "w") as member:
                    np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
    return stream.getvalue()


def read_golden(data: bytes) -> tuple[Arrays, Arrays]:
    """Inputs and outputs by tensor name. Raises ManifestError for what is no such file."""
    arrays = read_arrays(data)
    sides: tuple[Arrays, Arrays] = ({}, {})
    for name, array in arrays.items():
        side, _, tensor = name.partition(".")
        if side not in ("in", "out") or not tensor:
            raise ManifestError(f"a golden pair holds arrays in.NAME and out.NAME, found {name[:80]!r}")
        sides[side == "out"][tensor] = array
    return sides


def read_arrays(data: bytes) -> Arrays:
    """The arrays of an .npz file by name, little-endian. Raises ManifestError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if len(members) > 2 * MAX_TENSORS or total > MAX_BYTES:
                raise ManifestError(
                    f"expected at most {2 * MAX_TENSORS} arrays of {MAX_BYTES} bytes in all, found {len(members)} of {total}"
                )
            return {m.filename.removesuffix(".npy"): _array(_unpacked(archive, m)) for m in members}
    except _BROKEN as error:
        raise ManifestError(f"not an .npz file of plain arrays: {error}") from None


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's bytes, so many as the directory states: `read` without a size unpacks all that there is first."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ManifestError(f"{member.filename[:80]!r} is packed by method {member.compress_type}, expected deflate")
    with archive.open(member) as stream:
        return stream.read(member.file_size)


def _array(raw: bytes) -> np.ndarray:
    """An array from the bytes of an .npy file, whose shape must be what the bytes hold."""
    stream = io.BytesIO(raw)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in read:
        raise ManifestError(f".npy version {version}")
    shape, fortran, dtype = read[version](stream)
    if dtype.name not in DTYPES:
        raise ManifestError(f"an array of {dtype.name}, expected one of {', '.join(DTYPES)}")
    body = raw[stream.tell() :]
    if len(body) != prod(shape) * dtype.itemsize or any(dim < 0 for dim in shape):
        raise ManifestError(f"{len(body)} bytes for an array of {dtype.name}{list(shape)}")
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("<")).reshape(shape)
