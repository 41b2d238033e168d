"""What validators sign about the tree: verifier keys, signed notes, the checkpoint body and its cosignatures.

Source: C2SP signed-note, tlog-checkpoint and tlog-cosignature, all v1, so that common transparency-log tools read ours.
Parsing is strict, one spelling for each meaning, and capped; whatever does not fit raises ProofError.
A signature line and a note are str that end in a newline, so body + newline + signature lines is a note.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bmoe.ledger.rules.merkle import EMPTY_ROOT, HASH_BYTES, MAX_SIZE
from bmoe.protocol.errors import MessageError, ProofError
from bmoe.protocol.keys import check_public_key, verify_ed25519

ED25519 = 0x01  # the log's own signature over the note text
COSIGNATURE_V1 = 0x04  # a timestamped Ed25519 cosignature of a checkpoint

MAX_NOTE_BYTES = 256 * 1024
MAX_SIGNATURES = 128
KEY_ID_BYTES = 4
_COSIGNATURE_HEADER = "cosignature/v1\n"
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_VKEY = re.compile(r"([^+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/=]+)")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True)
class VerifierKey:
    """A key this reader trusts for one signature type: its name, type byte and public key bytes."""

    name: str
    algorithm: int
    public_key: bytes

    def __post_init__(self) -> None:
        check_key_name(self.name)
        if self.algorithm not in _VERIFY:
            known = ", ".join(f"{number:#04x}" for number in _VERIFY)
            raise ProofError(f"verifier key {_shown(self.name)} has signature type {self.algorithm!a}, known: {known}")
        try:
            check_public_key(self.public_key)
        except MessageError as weak:
            raise ProofError(f"verifier key {_shown(self.name)}: {weak}") from weak

    @property
    def key_id(self) -> bytes:
        """The 4 bytes that name this key beside its name; a look-up aid, never a proof."""
        return note_key_id(self.name, self.algorithm, self.public_key)

    def format(self) -> str:
        """The vkey text: name, hex key id and base64 of type byte and public key, joined by plus signs."""
        return f"{self.name}+{self.key_id.hex()}+{_base64(bytes([self.algorithm]) + self.public_key)}"


def note_key_id(name: str, algorithm: int, public_key: bytes) -> bytes:
    """First 4 bytes of SHA-256 over name, newline, type byte and public key."""
    material = name.encode() + b"\n" + bytes([algorithm]) + public_key
    return hashlib.sha256(material).digest()[:KEY_ID_BYTES]


def parse_vkey(text: str) -> VerifierKey:
    """The verifier key of a vkey text; raises ProofError if malformed, weak, of an unknown type or with a wrong id."""
    match = _VKEY.fullmatch(text)
    if not match:
        raise ProofError(f"verifier key must be name+8 hex digits+base64, got {_shown(text)}")
    name, key_id, material = match.group(1), match.group(2), decode_base64(match.group(3), "verifier key")
    vkey = VerifierKey(name, material[0], material[1:])
    if vkey.key_id.hex() != key_id:
        raise ProofError(f"verifier key {_shown(name)} carries key id {key_id}, its key has {vkey.key_id.hex()}")
    return vkey


@dataclass(frozen=True)
class Checkpoint:
    """A tree head: the log's origin, its size in leaves and its 32-byte root."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not self.origin or "\n" in self.origin:
            raise ProofError(f"checkpoint origin must be one non-empty line, got {_shown(self.origin)}")
        _check_text(self.origin, "checkpoint origin")
        if not 0 <= self.size <= MAX_SIZE:
            raise ProofError(f"checkpoint size must be 0..2^63 - 1, got {self.size}")
        if len(self.root) != HASH_BYTES:
            raise ProofError(f"checkpoint root must be {HASH_BYTES} bytes, got {len(self.root)}")
        if self.size == 0 and self.root != EMPTY_ROOT:
            raise ProofError(f"checkpoint of size 0 must have the empty root, got {self.root.hex()}")

    def body(self) -> str:
        """The note text that is signed: three lines, each ending in a newline."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """The checkpoint of a note text (without signatures). Extension lines are refused: nothing here audits them."""
    lines = text.split("\n")
    if len(lines) != 4 or lines[3]:
        raise ProofError(f"checkpoint must be origin, size and root, each a line, got {_shown(text)}")
    size = parse_decimal(lines[1], "checkpoint size")
    return Checkpoint(lines[0], size, decode_base64(lines[2], "checkpoint root"))


@dataclass(frozen=True)
class NoteSignature:
    """One signature line: the key's name and 4-byte id, and the signature bytes of that key's type."""

    name: str
    key_id: bytes
    signature: bytes

    def line(self) -> str:
        """The line as it stands in a note, ending in a newline."""
        return f"— {self.name} {_base64(self.key_id + self.signature)}\n"


@dataclass(frozen=True)
class Note:
    """A signed text, ending in a newline, and its signature lines. Believe nothing in it before a verify_* passed."""

    text: str
    signatures: tuple[NoteSignature, ...]

    def format(self) -> str:
        """The note as text; parse_note gives it back unchanged."""
        return self.text + "\n" + "".join(signature.line() for signature in self.signatures)


def parse_note(data: str | bytes) -> Note:
    """The note of at most 256 KiB with 1 to 128 signature lines, of known and unknown keys alike; raises ProofError."""
    text = decode_text(data, MAX_NOTE_BYTES, "note")
    body, separator, tail = text.rpartition("\n\n")
    if not separator or not tail.endswith("\n"):
        raise ProofError(f"note must be a text, an empty line and signature lines, got {_shown(text)}")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise ProofError(f"note has {len(lines)} signatures, at most {MAX_SIGNATURES} are read")
    return Note(body + "\n", tuple(_parse_signature(line) for line in lines))


def cosign(body: str, name: str, private_key: Ed25519PrivateKey, timestamp_s: int) -> str:
    """The signature line by which cosigner `name` states that it holds this checkpoint (cosignature/v1, type 0x04).

    `timestamp_s` is the POSIX time of signing in seconds. Nothing but a checkpoint body is signed (ProofError).
    """
    parse_checkpoint(body)
    if not 0 <= timestamp_s <= MAX_SIZE:
        raise ProofError(f"cosignature timestamp must be 0..2^63 - 1 seconds, got {timestamp_s}")
    signature = private_key.sign(_cosigned(timestamp_s, body))
    return _signature_line(name, COSIGNATURE_V1, private_key, timestamp_s.to_bytes(8, "big") + signature)


def sign_note(text: str, name: str, private_key: Ed25519PrivateKey) -> str:
    """The signature line of key `name` over a note text (type 0x01), such as the log's own over its checkpoint."""
    _check_text(text, "note text")
    if not text.endswith("\n"):
        raise ProofError(f"note text must end in a newline, got {_shown(text)}")
    if text.startswith(_COSIGNATURE_HEADER):
        # Signed plainly, this text would pass for a cosignature wherever one key serves both types.
        raise ProofError(f"note text must not begin like a cosignature, got {_shown(text)}")
    return _signature_line(name, ED25519, private_key, private_key.sign(text.encode()))


def verify_cosignature(note: Note, vkey: VerifierKey) -> int:
    """The POSIX time in seconds at which this key cosigned the note's text, or ProofError.

    Every line of this key must verify; of several the latest time counts.
    """
    if vkey.algorithm != COSIGNATURE_V1:
        raise ProofError(f"verifier key {_shown(vkey.name)} has type {vkey.algorithm:#04x}, a cosigner's has 0x04")
    return _verify(note, vkey)


def verify_note(note: Note, vkey: VerifierKey) -> None:
    """Check that this log key (type 0x01) signed the note's text, or raise ProofError."""
    if vkey.algorithm != ED25519:
        raise ProofError(f"verifier key {_shown(vkey.name)} has type {vkey.algorithm:#04x}, a log's has 0x01")
    _verify(note, vkey)


def _verify(note: Note, vkey: VerifierKey) -> int:
    named = (vkey.name, vkey.key_id)
    lines = [line for line in note.signatures if (line.name, line.key_id) == named]
    if not lines:
        raise ProofError(f"note carries no signature of {_shown(vkey.name)} with key id {vkey.key_id.hex()}")
    return max(_VERIFY[vkey.algorithm](vkey, note.text, line.signature) for line in lines)


def _verify_plain(vkey: VerifierKey, text: str, signature: bytes) -> int:
    if not verify_ed25519(vkey.public_key, signature, text.encode()):
        raise ProofError(f"signature of {_shown(vkey.name)} does not verify over the note text")
    return 0


def _verify_timestamped(vkey: VerifierKey, text: str, signature: bytes) -> int:
    timestamp_s = int.from_bytes(signature[:8], "big")
    if len(signature) != 72 or timestamp_s > MAX_SIZE:
        raise ProofError(f"cosignature of {_shown(vkey.name)} must be a time below 2^63 and 64 bytes")
    if not verify_ed25519(vkey.public_key, signature[8:], _cosigned(timestamp_s, text)):
        raise ProofError(f"cosignature of {_shown(vkey.name)} at time {timestamp_s} does not verify over the note text")
    return timestamp_s


# One row a signature type this version reads; each returns the time signed, or 0 where the type carries none.
_VERIFY: dict[int, Callable[[VerifierKey, str, bytes], int]] = {
    ED25519: _verify_plain,
    COSIGNATURE_V1: _verify_timestamped,
}


def _cosigned(timestamp_s: int, body: str) -> bytes:
    return f"{_COSIGNATURE_HEADER}time {timestamp_s}\n{body}".encode()


def _signature_line(name: str, algorithm: int, private_key: Ed25519PrivateKey, signature: bytes) -> str:
    check_key_name(name)
    key_id = note_key_id(name, algorithm, private_key.public_key().public_bytes_raw())
    return NoteSignature(name, key_id, signature).line()


def _parse_signature(line: str) -> NoteSignature:
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != "—":
        raise ProofError(f"signature line must be em dash, key name and base64, got {_shown(line)}")
    check_key_name(parts[1])
    raw = decode_base64(parts[2], "signature line")
    if len(raw) <= KEY_ID_BYTES:
        raise ProofError(f"signature line of {_shown(parts[1])} must hold a 4-byte key id and a signature")
    return NoteSignature(parts[1], raw[:KEY_ID_BYTES], raw[KEY_ID_BYTES:])


def check_key_name(name: str) -> None:
    """Raise ProofError unless `name` may name a key: not empty, no Unicode space, plus sign or control character."""
    _check_text(name, "key name")
    if not name or "+" in name or any(character.isspace() for character in name):
        raise ProofError(f"key name must be non-empty without spaces or plus signs, got {_shown(name)}")


def decode_text(data: str | bytes, cap: int, what: str) -> str:
    """UTF-8 text of at most `cap` bytes without control characters but newline, or ProofError."""
    if len(data) > cap:
        raise ProofError(f"{what} must be at most {cap} bytes, got {len(data)}")
    try:
        text = data if isinstance(data, str) else data.decode()
        length = len(text.encode())
    except UnicodeError:
        raise ProofError(f"{what} is not UTF-8") from None
    if length > cap:
        raise ProofError(f"{what} must be at most {cap} bytes, got {length}")
    _check_text(text, what)
    return text


def decode_base64(text: str, what: str) -> bytes:
    """The non-empty bytes of standard base64 in its one canonical spelling, or ProofError."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or _base64(raw) != text:
        raise ProofError(f"{what} must be canonical base64, got {_shown(text)}")
    return raw


def parse_decimal(text: str, what: str) -> int:
    """The number 0..2^63 - 1 of ASCII digits without leading zeros, or ProofError."""
    if not _DECIMAL.fullmatch(text) or int(text) > MAX_SIZE:
        raise ProofError(f"{what} must be a decimal 0..2^63 - 1 without leading zeros, got {_shown(text)}")
    return int(text)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ProofError(f"{what} is not UTF-8") from None
    if found := _CONTROL.search(text):
        raise ProofError(f"{what} holds the control character {found.group()!a}")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _shown(text: str) -> str:
    """A short, quoted form of what came, safe in a log line."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")
