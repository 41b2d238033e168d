"""Frames: one stream message, signed once, carrying entries (one leaf each) and the attachments that open them.

A frame is a CBOR sequence: the envelope over a FrameHeader, every entry, then every inline attachment. The header
pins all of them, names the author's sequence and the author's previous frame, so that an author's history is a chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.entries import MAX_LEAF_BYTES
from bmoe.ledger.rules.merkle import leaf_hash
from bmoe.protocol.envelope import split_envelope
from bmoe.protocol.errors import BmoeError, MessageError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import FrameHeader, Sealed, open_message, seal_message

MAX_FRAME_BYTES = 8 * 1024 * 1024 - 64 * 1024
MAX_ENTRIES = 1024
INLINE_BYTES = 64 * 1024
NO_FRAME = bytes(32)


@dataclass(frozen=True)
class Frame:
    """A parsed frame; `missing` are attachments kept in the evidence store, by digest."""

    sealed: Sealed[FrameHeader]
    entries: tuple[bytes, ...]
    attachments: dict[bytes, bytes]
    missing: tuple[bytes, ...]

    @property
    def header(self) -> FrameHeader:
        """The signed head."""
        return self.sealed.header

    @property
    def digest(self) -> bytes:
        """What the author's next frame names as `previous`."""
        return frame_digest(self.sealed.raw)


def frame_digest(envelope: bytes) -> bytes:
    """SHA-256 of the frame's envelope, which pins everything behind it."""
    return hashlib.sha256(envelope).digest()


def build_frame(
    signer: Signer,
    *,
    ledger: bytes,
    epoch: int,
    author: str,
    seq: int,
    previous: bytes,
    time_ms: int,
    entries: Sequence[bytes],
    attachments: Sequence[bytes],
) -> tuple[bytes, bytes]:
    """A frame's bytes and its digest. Attachments above 64 KiB are named only: they must be in the evidence store."""
    if len(entries) > MAX_ENTRIES or max(map(len, entries), default=0) > MAX_LEAF_BYTES:
        largest = max(map(len, entries), default=0)
        raise MessageError(
            f"a frame has at most {MAX_ENTRIES} entries of {MAX_LEAF_BYTES} bytes, this one {len(entries)}, the largest "
            f"of {largest}"
        )
    unique = {hashlib.sha256(a).digest(): a for a in attachments}
    header = FrameHeader(
        ledger=ledger,
        epoch=epoch,
        author=author,
        seq=seq,
        previous=previous,
        time_ms=time_ms,
        entries=tuple(leaf_hash(e) for e in entries),
        attachments=tuple((d, len(a), len(a) <= INLINE_BYTES) for d, a in unique.items()),
    )
    inline = [a for a in unique.values() if len(a) <= INLINE_BYTES]
    frame = seal_message(signer, header, [*entries, *inline])
    if len(frame) > MAX_FRAME_BYTES:
        raise MessageError(f"a frame has at most {MAX_FRAME_BYTES} bytes, this one {len(frame)}")
    return frame, frame_digest(frame[: split_envelope(frame)[1]])


def read_frame(data: bytes) -> Frame | BmoeError:
    """The frame that a stream message is, or why it is none: parsed once for all who look at a position."""
    try:
        return parse_frame(data)
    except BmoeError as error:
        return error


def parse_frame(data: bytes) -> Frame:
    """Split a stream message; raises InputError unless every entry and inline attachment is the one pinned."""
    if len(data) > MAX_FRAME_BYTES:
        raise MessageError(f"a frame has at most {MAX_FRAME_BYTES} bytes, found {len(data)}")
    sealed = open_message(FrameHeader, data, parts_max=MAX_ENTRIES + 4096)
    header, parts = sealed.header, sealed.parts
    inline = [a for a in header.attachments if a[2]]
    if len(parts) != len(header.entries) + len(inline):
        raise MessageError(
            f"the frame pins {len(header.entries)} entries and {len(inline)} attachments, {len(parts)} came"
        )
    entries, rest = parts[: len(header.entries)], parts[len(header.entries) :]
    for pinned, entry in zip(header.entries, entries, strict=True):
        if len(entry) > MAX_LEAF_BYTES or leaf_hash(entry) != pinned:
            raise MessageError(f"an entry is not the one that the frame pins as {pinned.hex()[:16]}")
    attachments = {}
    for (digest, size, _), attachment in zip(inline, rest, strict=True):
        if len(attachment) != size or hashlib.sha256(attachment).digest() != digest:
            raise MessageError(f"an attachment is not the one that the frame pins as {digest.hex()[:16]}")
        attachments[digest] = attachment
    missing = tuple(a[0] for a in header.attachments if not a[2])
    return Frame(sealed, entries, attachments, missing)
