"""Commitments to tensors: a salted Merkle root over rows, so that one row can be opened without the others.

A row's leaf is row_salt || author || 0x00 || shape || row bytes, hashed as RFC 6962 has it. The salt keeps a small tensor
from being guessed out of its digest; the author keeps one agent's digest useless to another (a copycat cannot open it);
the shape (CBOR of each tensor's name, dtype and the dims of a row) keeps the same bytes from being read as two values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bmoe.ledger.rules.merkle import root_over
from bmoe.protocol.encoding import encode
from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor, row_bytes, row_salt

SALT_BYTES = 16


def row_leaf(author: str, salt: bytes, tensors: Sequence[Tensor], index: int, rows: int) -> bytes:
    """The leaf of row `index`, hashed as RFC 6962 has it. A batch of one holds whole tensors, batch axis or not."""
    content = (
        b"".join(len(t.data).to_bytes(4, "big") + t.data for t in tensors) if rows == 1 else row_bytes(tensors, index)
    )
    return row_salt(salt, index) + author.encode() + b"\x00" + _shape(tensors, rows) + content


def _shape(tensors: Sequence[Tensor], rows: int) -> bytes:
    return encode(tuple((t.name, t.dtype, t.dims if rows == 1 else t.dims[1:]) for t in tensors))


def _leaf_hashes(author: str, salt: bytes, tensors: Sequence[Tensor], rows: int) -> list[bytes]:
    """The hash of each row's leaf, without ever putting a leaf together: most bytes that we see pass through here."""
    middle = author.encode() + b"\x00" + _shape(tensors, rows)
    parts = [(memoryview(t.data), len(t.data) // rows, (len(t.data) // rows).to_bytes(4, "big")) for t in tensors]
    hashes = []
    for index in range(rows):
        leaf = hashlib.sha256(b"\x00" + row_salt(salt, index) + middle)
        for data, size, head in parts:
            leaf.update(head)
            leaf.update(data[index * size : (index + 1) * size])
        hashes.append(leaf.digest())
    return hashes


def commit_rows(author: str, salt: bytes, tensors: Sequence[Tensor], rows: int) -> bytes:
    """The 32-byte commitment of `author` to `rows` rows; raises MessageError when axis 0 does not fit."""
    if len(salt) != SALT_BYTES:
        raise MessageError(f"a salt has {SALT_BYTES} bytes, got {len(salt)}")
    if rows < 1:
        raise MessageError(f"a batch has at least one row, got {rows}")
    if rows > 1:
        for tensor in tensors:
            if not tensor.dims or tensor.dims[0] != rows:
                raise MessageError(f"tensor {tensor.name!a} {list(tensor.dims)} does not have {rows} rows on axis 0")
    return root_over(_leaf_hashes(author, salt, tensors, rows))
