"""The signed envelope: COSE_Sign1 over a deterministic header, with the message type bound in external_aad.

Source: RFC 9052 sections 4.2 and 4.4; algorithm EdDSA (-8), RFC 9053 section 2.2. The shape is fixed:
18([<<{1: -8, 4: kid}>>, {}, payload, signature]), kid of 8 bytes. Everything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmoe.protocol.encoding import bstr, read_bstr
from bmoe.protocol.errors import EncodingError, EnvelopeError
from bmoe.protocol.keys import KEY_ID_BYTES, Signer, key_id, verify_ed25519

MAX_PAYLOAD_BYTES = 256 * 1024
_TAG_AND_ARRAY = b"\xd2\x84"
_EMPTY_MAP = b"\xa0"
_PROTECTED = b"\xa2\x01\x27\x04\x48"
_SIGNATURE1 = b"\x84\x6aSignature1"


def sig_structure(protected: bytes, external_aad: bytes, payload: bytes) -> bytes:
    """The bytes that are signed: Sig_structure for COSE_Sign1 (RFC 9052, section 4.4)."""
    return _SIGNATURE1 + bstr(protected) + bstr(external_aad) + bstr(payload)


@dataclass(frozen=True)
class Envelope:
    """A parsed envelope, its signature not yet verified."""

    key_id: bytes
    payload: bytes
    signature: bytes

    def verify(self, public_key: bytes, external_aad: bytes) -> None:
        """Raise EnvelopeError unless the signature is good for this key and this message type.

        The key id must be this key's own, or whoever looks keys up by it would read another signer than we do.
        """
        if self.key_id != key_id(public_key):
            raise EnvelopeError(
                f"bad signature: in the name of key {self.key_id.hex()}, not {key_id(public_key).hex()}"
            )
        signed = sig_structure(_PROTECTED + self.key_id, external_aad, self.payload)
        if not verify_ed25519(public_key, self.signature, signed):
            raise EnvelopeError(f"bad signature by key {self.key_id.hex()} for {external_aad.decode()}")

    def encode(self) -> bytes:
        """The envelope's one spelling."""
        protected = bstr(_PROTECTED + self.key_id)
        return _TAG_AND_ARRAY + protected + _EMPTY_MAP + bstr(self.payload) + bstr(self.signature)


def seal(signer: Signer, external_aad: bytes, payload: bytes) -> bytes:
    """Sign `payload` and return the whole envelope."""
    signature = signer.sign(sig_structure(_PROTECTED + signer.key_id, external_aad, payload))
    return Envelope(signer.key_id, payload, signature).encode()


def split_envelope(data: bytes) -> tuple[Envelope, int]:
    """The envelope that `data` begins with and the offset behind it; raises EnvelopeError for any other shape."""
    if data[:2] != _TAG_AND_ARRAY:
        raise EnvelopeError(f"expected a COSE_Sign1 (0xd284), found 0x{data[:2].hex()}")
    try:
        protected, offset = read_bstr(data, 2)
        if data[offset : offset + 1] != _EMPTY_MAP:
            raise EnvelopeError("the unprotected header must be empty")
        payload, offset = read_bstr(data, offset + 1)
        signature, offset = read_bstr(data, offset)
    except EncodingError as error:
        raise EnvelopeError(f"truncated or malformed COSE_Sign1: {error}") from error
    if protected[: len(_PROTECTED)] != _PROTECTED or len(protected) != len(_PROTECTED) + KEY_ID_BYTES:
        raise EnvelopeError(f"protected header must be {{1: -8, 4: kid of 8 bytes}}, found 0x{protected.hex()[:40]}")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise EnvelopeError(f"payload of {len(payload)} bytes exceeds the cap of {MAX_PAYLOAD_BYTES}")
    if len(signature) != 64:
        raise EnvelopeError(f"an Ed25519 signature has 64 bytes, found {len(signature)}")
    return Envelope(protected[len(_PROTECTED) :], payload, signature), offset


def parse_envelope(data: bytes) -> Envelope:
    """The envelope that `data` is, with nothing behind it."""
    envelope, end = split_envelope(data)
    if end != len(data):
        raise EnvelopeError(f"{len(data) - end} bytes behind the envelope")
    return envelope
