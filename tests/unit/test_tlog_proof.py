"""The receipt text: written, read back, carried to a verdict, and refused in any other spelling."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from bmoe.ledger.rules import checkpoint as ck
from bmoe.ledger.rules import merkle
from bmoe.ledger.rules.tlog_proof import MAX_PROOF_BYTES, format_proof, parse_proof
from bmoe.protocol.errors import ProofError

LEAVES = [f"entry {number}".encode() for number in range(13)]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
VKEY = ck.VerifierKey("validator.example", ck.COSIGNATURE_V1, KEY.public_key().public_bytes_raw())
BODY = ck.Checkpoint("ledger.example/epoch0", len(LEAVES), merkle.merkle_root(LEAVES)).body()
NOTE = BODY + "\n" + ck.cosign(BODY, VKEY.name, KEY, 1_790_000_000)


def receipt(index: int, extra: bytes | None = None) -> str:
    return format_proof(index, merkle.row_proof(LEAVES, index), NOTE, extra)


def verify(text: str | bytes, leaf: bytes) -> None:
    """What an auditor does with one receipt and one trusted validator."""
    proof = parse_proof(text)
    ck.verify_cosignature(proof.note, VKEY)
    head = proof.checkpoint
    merkle.verify_inclusion(proof.index, head.size, merkle.leaf_hash(leaf), proof.path, head.root)


def test_the_receipt_of_every_leaf_proves_that_leaf_and_no_other() -> None:
    for index, leaf in enumerate(LEAVES):
        verify(receipt(index), leaf)
        verify(receipt(index, b"context").encode(), leaf)
        with pytest.raises(ProofError, match="inclusion proof gives root"):
            verify(receipt(index), LEAVES[index - 1])


def test_the_text_is_as_the_specification_lays_it_out() -> None:
    path = merkle.row_proof(LEAVES, 12)
    lines = [base64.b64encode(sibling).decode() for sibling in path]
    expected = "\n".join(["c2sp.org/tlog-proof@v1", "extra AQL/", "index 12", *lines, "", NOTE])
    assert receipt(12, b"\x01\x02\xff") == expected
    proof = parse_proof(expected)
    assert (proof.extra, proof.index, list(proof.path)) == (b"\x01\x02\xff", 12, path)
    assert proof.note.format() == NOTE


def test_the_only_leaf_of_a_tree_has_an_empty_path() -> None:
    body = ck.Checkpoint("ledger.example/epoch0", 1, merkle.leaf_hash(b"only")).body()
    text = format_proof(0, [], body + "\n" + ck.cosign(body, VKEY.name, KEY, 5))
    assert text.startswith("c2sp.org/tlog-proof@v1\nindex 0\n\nledger.example/epoch0\n1\n")
    assert parse_proof(text).extra is None
    verify(text, b"only")


GOOD = receipt(5, b"context")
BAD = {
    "empty": "",
    "other version": GOOD.replace("@v1", "@v2"),
    "leading space": " " + GOOD,
    "carriage returns": GOOD.replace("\n", "\r\n"),
    "no index": GOOD.replace("index 5\n", ""),
    "index twice": GOOD.replace("index 5\n", "index 5\nindex 5\n"),
    "index with a leading zero": GOOD.replace("index 5", "index 05"),
    "negative index": GOOD.replace("index 5", "index -5"),
    "index without a space": GOOD.replace("index 5", "index5"),
    "index beyond the tree": GOOD.replace("index 5", "index 13"),
    "index beyond 2^63": GOOD.replace("index 5", f"index {2**64}"),
    "extra after index": "c2sp.org/tlog-proof@v1\nindex 5\nextra AAAA\n\n" + NOTE,
    "empty extra": "c2sp.org/tlog-proof@v1\nextra \nindex 5\n\n" + NOTE,
    "extra not base64": "c2sp.org/tlog-proof@v1\nextra ***\nindex 5\n\n" + NOTE,
    "extra twice": "c2sp.org/tlog-proof@v1\nextra AAAA\nextra AAAA\nindex 5\n\n" + NOTE,
    "short hash": f"c2sp.org/tlog-proof@v1\nindex 5\n{base64.b64encode(bytes(31)).decode()}\n\n" + NOTE,
    "65 hashes": "c2sp.org/tlog-proof@v1\nindex 5\n" + f"{base64.b64encode(bytes(32)).decode()}\n" * 65 + "\n" + NOTE,
    "no note": "c2sp.org/tlog-proof@v1\nindex 5\n",
    "no checkpoint in the note": "c2sp.org/tlog-proof@v1\nindex 5\n\n" + NOTE.replace("\n13\n", "\nthirteen\n"),
    "two empty lines before the note": "c2sp.org/tlog-proof@v1\nindex 5\n\n\n" + NOTE,
    "text after the note": GOOD + "\n",
    "over 1 MiB": "c2sp.org/tlog-proof@v1\nextra " + "A" * MAX_PROOF_BYTES + "\nindex 5\n\n" + NOTE,
    "not UTF-8": b"c2sp.org/tlog-proof@v1\nindex 5\n\xff\n\n" + NOTE.encode(),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_proof_in_any_other_spelling_is_refused(data: str | bytes) -> None:
    parse_proof(GOOD)
    with pytest.raises(ProofError):
        parse_proof(data)


def test_no_proof_is_written_that_nobody_could_read() -> None:
    for index, path, note, extra in (
        (13, [], NOTE, None),
        (5, [bytes(31)], NOTE, None),
        (5, [bytes(32)] * 65, NOTE, None),
        (5, [], BODY, None),
        (5, [], NOTE, b""),
        (5, [], NOTE, bytes(MAX_PROOF_BYTES)),
    ):
        with pytest.raises(ProofError):
            format_proof(index, path, note, extra)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_is_never_believed(data: st.DataObject) -> None:
    raw = bytearray(receipt(5).encode())
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << at % 8
    with pytest.raises(ProofError):
        verify(bytes(raw), LEAVES[5])


@given(st.binary(max_size=400))
def test_noise_is_refused_quietly(noise: bytes) -> None:
    for data in (noise, b"c2sp.org/tlog-proof@v1\nindex 0\n" + noise, b"c2sp.org/tlog-proof@v1\nextra " + noise):
        with pytest.raises(ProofError):
            parse_proof(data)
