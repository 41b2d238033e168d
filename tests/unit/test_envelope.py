"""The envelope is COSE_Sign1 as RFC 9052 has it, and nothing else passes for one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from vectors import vectors

from bmoe.protocol.encoding import bstr
from bmoe.protocol.envelope import MAX_PAYLOAD_BYTES, Envelope, parse_envelope, seal, sig_structure, split_envelope
from bmoe.protocol.errors import EnvelopeError, InputError
from bmoe.protocol.keys import Signer, key_id, verify_ed25519
from bmoe.protocol.messages import Output, Refusal, Task, open_message, seal_message

SIGNER, OTHER = Signer.from_bytes(bytes([1] * 32)), Signer.from_bytes(bytes([2] * 32))
AAD = b"bmoe/test/v1"


def _vectors(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    files = sorted(Path(vectors("cose")).glob(pattern))
    assert files, f"no vectors match {pattern}"
    return [(f.name, json.loads(f.read_text())) for f in files]


def _sign1(case: dict[str, Any]) -> list[Any]:
    """The four items of a COSE_Sign1 example, under whatever tag it has."""
    value = cbor2.loads(bytes.fromhex(case["output"]["cbor"]))
    return list(value.value if isinstance(value, cbor2.CBORTag) else value)


def test_what_is_signed_is_what_the_working_group_signed() -> None:
    checked = 0
    for name, case in _vectors("*/*.json"):
        if "sign0" not in case["input"]:
            continue
        published = bytes.fromhex(case["intermediates"]["ToBeSign_hex"])
        label, protected, external, payload = cbor2.loads(published)
        assert label == "Signature1", name
        assert sig_structure(protected, external, payload) == published, name
        given = bytes.fromhex(case["input"]["sign0"].get("external", ""))
        plain = case["input"]["plaintext"].encode()
        assert (external, payload) == (given, plain), name
        if not case.get("fail"):
            body_protected, _, body_payload, _ = _sign1(case)
            # An empty protected map is signed as no bytes at all (RFC 9052, section 4.4).
            shown = b"" if body_protected == b"\xa0" else body_protected
            assert sig_structure(shown, given, body_payload) == published, name
        checked += 1
    assert checked >= 10


def test_the_working_groups_ed25519_signature_is_good_for_our_bytes() -> None:
    case = dict(_vectors("eddsa-examples/eddsa-sig-01.json"))["eddsa-sig-01.json"]
    protected, _, payload, signature = _sign1(case)
    key = bytes.fromhex(case["input"]["sign0"]["key"]["x_hex"])
    assert verify_ed25519(key, signature, sig_structure(protected, b"", payload))
    assert not verify_ed25519(key, signature, sig_structure(protected, b"x", payload))
    private = Signer.from_bytes(bytes.fromhex(case["input"]["sign0"]["key"]["d_hex"]))
    assert private.public_key == key
    assert private.sign(sig_structure(protected, b"", payload)) == signature


def test_foreign_and_spoiled_examples_are_refused_before_any_signature_is_looked_at() -> None:
    names = []
    for name, case in _vectors("*/*.json"):
        with pytest.raises(EnvelopeError):
            parse_envelope(bytes.fromhex(case["output"]["cbor"]))
        names.append(name)
    assert sum(n.startswith("sign-fail") for n in names) == 6


def test_a_stranger_with_cbor2_and_cryptography_reads_ours() -> None:
    data = seal(SIGNER, AAD, b"payload")
    message = cbor2.loads(data)
    assert message.tag == 18
    protected, unprotected, payload, signature = message.value
    assert cbor2.loads(protected) == {1: -8, 4: key_id(SIGNER.public_key)}
    assert (unprotected, payload, len(signature)) == ({}, b"payload", 64)
    signed = cbor2.dumps(["Signature1", protected, AAD, payload])
    Ed25519PublicKey.from_public_bytes(SIGNER.public_key).verify(signature, signed)
    assert cbor2.dumps(message) == data


def test_no_bit_can_be_turned() -> None:
    data = seal(SIGNER, AAD, b"the payload")
    parse_envelope(data).verify(SIGNER.public_key, AAD)
    for bit in range(8 * len(data)):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError):
            parse_envelope(bytes(spoiled)).verify(SIGNER.public_key, AAD)


def test_no_byte_can_be_missing_and_none_added() -> None:
    data = seal(SIGNER, AAD, b"the payload")
    for end in range(len(data)):
        with pytest.raises(EnvelopeError):
            parse_envelope(data[:end])
    with pytest.raises(EnvelopeError, match="1 bytes behind"):
        parse_envelope(data + b"\x00")
    assert split_envelope(data + b"\x00")[1] == len(data)


def test_another_key_and_another_type_are_refused() -> None:
    envelope = parse_envelope(seal(SIGNER, AAD, b"payload"))
    with pytest.raises(EnvelopeError, match="key"):
        envelope.verify(OTHER.public_key, AAD)
    for aad in (b"", b"bmoe/test/v2", b"bmoe/task/v1"):
        with pytest.raises(EnvelopeError, match="bad signature"):
            envelope.verify(SIGNER.public_key, aad)
    with pytest.raises(EnvelopeError):
        envelope.verify(bytes(31), AAD)


def test_a_signer_cannot_name_another_key_than_its_own() -> None:
    """Whoever looks keys up by key id must find the signer that we verified."""
    protected = b"\xa2\x01\x27\x04\x48" + OTHER.key_id
    signature = SIGNER.sign(sig_structure(protected, AAD, b"payload"))
    lie = Envelope(OTHER.key_id, b"payload", signature)
    assert verify_ed25519(SIGNER.public_key, signature, sig_structure(protected, AAD, b"payload"))
    with pytest.raises(EnvelopeError, match="in the name of key"):
        lie.verify(SIGNER.public_key, AAD)


def _output() -> Output:
    return Output(
        ledger=bytes(16), epoch=1, author="agent-1", seq=1, task=bytes(16), expert=bytes(32), input_root=bytes(32),
        rows=1, outputs=(), output_root=bytes(32), provider="CPU", duration_us=1,
    )  # fmt: skip


def test_type_confusion_an_output_never_passes_for_a_task() -> None:
    data = seal_message(SIGNER, _output())
    open_message(Output, data).verify(SIGNER.public_key)
    for wrong in (Task, Refusal):
        with pytest.raises(InputError, match="found type 2"):
            open_message(wrong, data)
    # An output's header signed under a task's context: the header reads, the signature does not.
    confused = seal(SIGNER, Task.CONTEXT.encode(), _output().to_bytes())
    with pytest.raises(EnvelopeError, match="bad signature"):
        open_message(Output, confused).verify(SIGNER.public_key)


@pytest.mark.parametrize(
    ("story", "spoil", "words"),
    [
        ("no tag", lambda d: d[1:], "expected a COSE_Sign1"),
        ("three items", lambda d: b"\xd2\x83" + d[2:], "expected a COSE_Sign1"),
        ("something unprotected", lambda d: d.replace(b"\xa0", b"\xa1\x04\x00", 1), "unprotected header must be empty"),
        ("ES256", lambda d: d.replace(b"\x01\x27", b"\x01\x26", 1), "protected header must be"),
        ("no key id", lambda d: b"\xd2\x84" + bstr(b"\xa1\x01\x27") + d[17:], "protected header must be"),
        ("detached payload", lambda d: d[:17] + b"\xf6" + d[17:], "expected a byte string"),
        ("short signature", lambda d: d[:-66] + bstr(d[-64:-1]), "64 bytes, found 63"),
        ("long head", lambda d: d[:17] + b"\x58\x07" + d[18:], "shortest form"),
    ],
)
def test_every_other_shape_is_refused_with_its_fault_named(story: str, spoil: Any, words: str) -> None:
    data = seal(SIGNER, AAD, b"payload")
    assert data[16:18] == b"\xa0\x47"
    with pytest.raises(EnvelopeError, match=words):
        parse_envelope(spoil(data))


def test_a_payload_over_the_cap_is_refused() -> None:
    parse_envelope(seal(SIGNER, AAD, bytes(MAX_PAYLOAD_BYTES)))
    with pytest.raises(EnvelopeError, match="exceeds the cap"):
        parse_envelope(seal(SIGNER, AAD, bytes(MAX_PAYLOAD_BYTES + 1)))
