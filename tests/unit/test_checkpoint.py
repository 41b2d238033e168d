"""Verifier keys, notes, checkpoints and cosignatures: what is signed verifies, and every other spelling is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import vectors

from bmoe.ledger.rules import checkpoint as ck
from bmoe.ledger.rules.merkle import EMPTY_ROOT, leaf_hash
from bmoe.protocol.errors import ProofError

TESSERA_VKEY = "example.com/log/testdata+33d7b496+AeHTu4Q3hEIMHNqc6fASMsq3rKNx280NI+oO5xCFkkSx"
ORIGIN = "ledger.example/fleet1/epoch0"
BODY = ck.Checkpoint(ORIGIN, 1234, leaf_hash(b"root")).body()
TIME_S = 1_790_000_000


def private_key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def cosigner(seed: int) -> ck.VerifierKey:
    name = f"validator{seed}.example"
    return ck.VerifierKey(name, ck.COSIGNATURE_V1, private_key(seed).public_key().public_bytes_raw())


def cosigned(*seeds: int, body: str = BODY, time_s: int = TIME_S) -> ck.Note:
    lines = [ck.cosign(body, cosigner(seed).name, private_key(seed), time_s) for seed in seeds]
    return ck.parse_note(body + "\n" + "".join(lines))


# --- the formats, as they must read for ever


def test_golden_note_signed_by_a_log_and_a_cosigner() -> None:
    log = ck.VerifierKey(ORIGIN, ck.ED25519, private_key(1).public_key().public_bytes_raw())
    golden_log = "ledger.example/fleet1/epoch0+f9cfd2b4+AYqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c"
    golden_cosigner = "validator2.example+6ef39d18+BIE5dw6ofRdfVqNUZsNMfszLjYqRtO43ol32D1uPybOU"
    golden = (
        "ledger.example/fleet1/epoch0\n"
        "1234\n"
        "PAb5plclr2BSYfY2ZyyWINQJcx2JpFHXRV/pxK4WeCk=\n"
        "\n"
        "— ledger.example/fleet1/epoch0 +c/StAmBbh7SnAWBpC4xzrWpUG01vKL0z3aUKby"
        "9s11tExYJknRZNtKzHVYjedrsdSNAHA9esLNXw7Ezt7fyJ7M88gI=\n"
        "— validator2.example bvOdGAAAAABqsTuAj1kbzC1CQ4K0eE/P/hatgYzQQIrr3AHkx"
        "K/4TjfjiwZxedZ893XK+/o/jXSdX2I2emCdfZ0wouLebQQ2HetICA==\n"
    )  # fmt: skip
    assert (log.format(), cosigner(2).format()) == (golden_log, golden_cosigner)
    lines = ck.sign_note(BODY, ORIGIN, private_key(1)) + ck.cosign(BODY, cosigner(2).name, private_key(2), TIME_S)
    assert BODY + "\n" + lines == golden
    note = ck.parse_note(golden.encode())
    ck.verify_note(note, ck.parse_vkey(golden_log))
    assert ck.verify_cosignature(note, ck.parse_vkey(golden_cosigner)) == TIME_S
    assert ck.parse_checkpoint(note.text) == ck.Checkpoint(ORIGIN, 1234, leaf_hash(b"root"))
    assert note.format() == golden


def test_every_checkpoint_of_a_log_written_by_other_software_verifies_under_its_key() -> None:
    log: Path = vectors("tessera-log")
    vkey = ck.parse_vkey(TESSERA_VKEY)
    assert vkey.format() == TESSERA_VKEY
    files = sorted(log.glob("checkpoint*"))
    sizes = []
    for file in files:
        note = ck.parse_note(file.read_bytes())
        ck.verify_note(note, vkey)
        head = ck.parse_checkpoint(note.text)
        assert head.origin == vkey.name
        assert note.format().encode() == file.read_bytes()
        sizes.append(head.size)
    assert sorted(sizes) == [*range(16), 15]


# --- who signed, and what


def test_each_cosigner_of_a_note_is_found_and_a_stranger_is_ignored() -> None:
    note = cosigned(2, 3, 4)
    assert [ck.verify_cosignature(note, cosigner(seed)) for seed in (2, 3, 4)] == [TIME_S] * 3
    with pytest.raises(ProofError, match=r"carries no signature of 'validator5\.example'"):
        ck.verify_cosignature(note, cosigner(5))


def test_a_cosignature_moved_to_another_root_size_or_origin_does_not_verify() -> None:
    stolen = cosigned(2).signatures
    others = (
        ck.Checkpoint(ORIGIN, 1234, leaf_hash(b"other root")),
        ck.Checkpoint(ORIGIN, 1235, leaf_hash(b"root")),
        ck.Checkpoint("ledger.example/fleet1/epoch1", 1234, leaf_hash(b"root")),
    )
    for other in others:
        with pytest.raises(ProofError, match="does not verify over the note text"):
            ck.verify_cosignature(ck.Note(other.body(), stolen), cosigner(2))


def test_a_redated_cosignature_does_not_verify() -> None:
    (line,) = cosigned(2).signatures
    redated = ck.NoteSignature(line.name, line.key_id, (TIME_S + 1).to_bytes(8, "big") + line.signature[8:])
    with pytest.raises(ProofError, match="does not verify"):
        ck.verify_cosignature(ck.Note(BODY, (redated,)), cosigner(2))


def test_a_time_beyond_2_63_and_a_cut_signature_are_refused() -> None:
    (line,) = cosigned(2).signatures
    for signature in (b"\x80" + line.signature[1:], line.signature[:-1], line.signature + b"\0", b"\0"):
        spoiled = ck.NoteSignature(line.name, line.key_id, signature)
        with pytest.raises(ProofError, match="must be a time below"):
            ck.verify_cosignature(ck.Note(BODY, (spoiled,)), cosigner(2))


def test_one_bad_line_of_a_known_key_spoils_the_note_whatever_its_good_line_says() -> None:
    good, other = cosigned(2), cosigned(2, body=ck.Checkpoint(ORIGIN, 9, leaf_hash(b"x")).body())
    with pytest.raises(ProofError, match="does not verify"):
        ck.verify_cosignature(ck.Note(BODY, good.signatures + other.signatures), cosigner(2))


def test_of_two_good_lines_of_one_key_the_latest_time_counts() -> None:
    lines = cosigned(2, time_s=50).signatures + cosigned(2, time_s=70).signatures + cosigned(2, time_s=60).signatures
    assert ck.verify_cosignature(ck.Note(BODY, lines), cosigner(2)) == 70


def test_a_key_collision_in_name_and_id_buys_an_attacker_only_a_failure() -> None:
    (forged,) = cosigned(3).signatures
    posing = ck.NoteSignature(cosigner(2).name, cosigner(2).key_id, forged.signature)
    with pytest.raises(ProofError, match="does not verify"):
        ck.verify_cosignature(ck.Note(BODY, (posing,)), cosigner(2))


def test_a_log_signature_never_counts_as_a_cosignature_nor_the_other_way() -> None:
    public_key = private_key(2).public_key().public_bytes_raw()
    log_key = ck.VerifierKey("validator2.example", ck.ED25519, public_key)
    signed = ck.parse_note(BODY + "\n" + ck.sign_note(BODY, log_key.name, private_key(2)))
    ck.verify_note(signed, log_key)
    with pytest.raises(ProofError, match="carries no signature"):
        ck.verify_cosignature(signed, cosigner(2))
    with pytest.raises(ProofError, match="carries no signature"):
        ck.verify_note(cosigned(2), log_key)
    with pytest.raises(ProofError, match="a cosigner's has 0x04"):
        ck.verify_cosignature(signed, log_key)
    with pytest.raises(ProofError, match="a log's has 0x01"):
        ck.verify_note(signed, cosigner(2))


def test_nobody_is_tricked_into_signing_a_cosignature_as_a_note_or_a_note_as_a_checkpoint() -> None:
    with pytest.raises(ProofError, match="begin like a cosignature"):
        ck.sign_note(f"cosignature/v1\ntime 5\n{BODY}", "log.example", private_key(2))
    for text in ("hello\n", BODY[:-1], BODY + "extension\n", ""):
        with pytest.raises(ProofError, match="checkpoint must be origin, size and root"):
            ck.cosign(text, "validator2.example", private_key(2), TIME_S)
    for time_s in (-1, 2**63):
        with pytest.raises(ProofError, match="timestamp"):
            ck.cosign(BODY, "validator2.example", private_key(2), time_s)
    with pytest.raises(ProofError, match="end in a newline"):
        ck.sign_note("no newline", "log.example", private_key(2))


# --- one spelling


def root_text(root: bytes) -> str:
    return base64.b64encode(root).decode()


ROOT = root_text(leaf_hash(b"root"))
BAD_CHECKPOINTS = {
    "no origin": f"\n5\n{ROOT}\n",
    "leading zero": f"o\n05\n{ROOT}\n",
    "plus sign": f"o\n+5\n{ROOT}\n",
    "negative": f"o\n-5\n{ROOT}\n",
    "space": f"o\n 5\n{ROOT}\n",
    "underscore": f"o\n1_0\n{ROOT}\n",
    "other script's digits": f"o\n1٥\n{ROOT}\n",
    "empty size": f"o\n\n{ROOT}\n",
    "2^63": f"o\n{2**63}\n{ROOT}\n",
    "five thousand digits": f"o\n{'9' * 5000}\n{ROOT}\n",
    "root without padding": f"o\n5\n{ROOT[:-1]}\n",
    "root with spare bits": f"o\n5\n{ROOT[:-2]}{chr(ord(ROOT[-2]) + 1)}=\n",
    "root in the URL alphabet": f"o\n5\n{'-' * 43}=\n",
    "short root": f"o\n5\n{root_text(bytes(31))}\n",
    "long root": f"o\n5\n{root_text(bytes(33))}\n",
    "root of an empty tree that is not empty": f"o\n0\n{ROOT}\n",
    "extension line": f"o\n5\n{ROOT}\nextra\n",
    "blank extension line": f"o\n5\n{ROOT}\n\n",
    "no final newline": f"o\n5\n{ROOT}",
    "carriage returns": f"o\r\n5\r\n{ROOT}\r\n",
    "control character": f"o\x00\n5\n{ROOT}\n",
    "lone surrogate": f"o\ud800\n5\n{ROOT}\n",
}


@pytest.mark.parametrize("text", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_a_checkpoint_in_any_other_spelling_is_refused(text: str) -> None:
    with pytest.raises(ProofError):
        ck.parse_checkpoint(text)


LINE = ck.sign_note(BODY, "log.example", private_key(2))
BAD_NOTES = {
    "empty": "",
    "text alone": BODY,
    "no signature": BODY + "\n",
    "no blank line": BODY + LINE,
    "no final newline": BODY + "\n" + LINE[:-1],
    "hyphen for dash": BODY + "\n" + LINE.replace("—", "-"),
    "no space after dash": BODY + "\n" + LINE.replace("— ", "—"),
    "two spaces": BODY + "\n" + LINE.replace("— ", "—  "),
    "no name": BODY + "\n" + LINE.replace("log.example", ""),
    "plus in name": BODY + "\n" + LINE.replace("log.example", "log+example"),
    "no-break space in name": BODY + "\n" + LINE.replace("log.example", "log\u00a0example"),
    "ideographic space in name": BODY + "\n" + LINE.replace("log.example", "log\u3000example"),
    "bad base64": BODY + "\n" + LINE[:-2] + "!\n",
    "key id alone": BODY + "\n— log.example AAAAAA==\n",
    "text after signatures": BODY + "\n" + LINE + "more\n",
    "tab": BODY.replace("fleet1", "fleet\t1") + "\n" + LINE,
    "delimited by carriage returns": (BODY + "\n" + LINE).replace("\n", "\r\n"),
    "129 signatures": BODY + "\n" + LINE * 129,
    "over the cap": "x" * ck.MAX_NOTE_BYTES + "\n\n" + LINE,
    "over the cap in bytes only": "é" * (ck.MAX_NOTE_BYTES // 2) + "\n\n" + LINE,
    "not UTF-8": b"\xff\n\n" + LINE.encode(),
    "lone surrogate": "\ud800\n\n" + LINE,
}


@pytest.mark.parametrize("data", BAD_NOTES.values(), ids=BAD_NOTES.keys())
def test_a_note_in_any_other_spelling_is_refused(data: str | bytes) -> None:
    with pytest.raises(ProofError):
        ck.parse_note(data)


def test_a_note_text_may_hold_empty_lines_and_128_signatures_are_read() -> None:
    text = "first\n\nsecond\n\n\n"
    line = ck.sign_note(text, "log.example", private_key(2))
    note = ck.parse_note(text + "\n" + line * 128)
    assert note.text == text
    ck.verify_note(note, ck.VerifierKey("log.example", ck.ED25519, private_key(2).public_key().public_bytes_raw()))


GOOD_VKEY = cosigner(2).format()
NAME, KEY_ID, MATERIAL = GOOD_VKEY.split("+", 2)


def vkey_text(name: str, algorithm: int, public_key: bytes) -> str:
    key_id = ck.note_key_id(name, algorithm, public_key).hex()
    return f"{name}+{key_id}+{base64.b64encode(bytes([algorithm]) + public_key).decode()}"


BAD_VKEYS = {
    "empty": "",
    "two parts": f"{NAME}+{KEY_ID}",
    "wrong id": f"{NAME}+00000000+{MATERIAL}",
    "upper-case id": f"{NAME}+{KEY_ID.upper()}+{MATERIAL}",
    "short id": f"{NAME}+{KEY_ID[:-1]}+{MATERIAL}",
    "renamed": f"other.example+{KEY_ID}+{MATERIAL}",
    "space in name": f"a b+{KEY_ID}+{MATERIAL}",
    "final newline": GOOD_VKEY + "\n",
    "bad base64": f"{NAME}+{KEY_ID}+{MATERIAL[:-1]}",
    "no key": f"{NAME}+{KEY_ID}+=",
    "ECDSA type": vkey_text("w.example", 0x02, bytes(range(32))),
    "ML-DSA type": vkey_text("w.example", 0x06, bytes(1312)),
    "short public key": vkey_text("w.example", 0x04, bytes(range(31))),
    "long public key": vkey_text("w.example", 0x04, bytes(range(33))),
    "identity point, for which one signature fits many texts": vkey_text("w.example", 0x04, b"\1" + bytes(31)),
}


@pytest.mark.parametrize("text", BAD_VKEYS.values(), ids=BAD_VKEYS.keys())
def test_a_malformed_or_weak_verifier_key_is_refused(text: str) -> None:
    assert ck.parse_vkey(GOOD_VKEY) == cosigner(2)
    with pytest.raises(ProofError):
        ck.parse_vkey(text)


def test_errors_show_little_of_what_came_and_nothing_a_terminal_obeys() -> None:
    with pytest.raises(ProofError) as refused:
        ck.parse_note("\u202e" + "A" * 100_000 + "\n")
    assert len(str(refused.value)) < 200
    assert str(refused.value).isascii()


# --- fuzz


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_in_a_cosigned_checkpoint_is_never_believed(data: st.DataObject) -> None:
    raw = bytearray(cosigned(2).format().encode())
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << at % 8
    with pytest.raises(ProofError):
        ck.verify_cosignature(ck.parse_note(bytes(raw)), cosigner(2))


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_noise_is_refused_quietly(noise: bytes | str) -> None:
    with pytest.raises(ProofError):
        ck.parse_checkpoint(ck.parse_note(noise).text)
    with pytest.raises(ProofError):
        ck.parse_vkey(noise if isinstance(noise, str) else noise.decode("latin-1"))


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1), st.integers(1, 2**63 - 1))
def test_any_checkpoint_reads_back_as_itself(origin: str, size: int) -> None:
    head = ck.Checkpoint(origin, size, leaf_hash(origin.encode()))
    assert ck.parse_checkpoint(head.body()) == head


def test_an_empty_tree_has_a_checkpoint() -> None:
    assert ck.parse_checkpoint(f"{ORIGIN}\n0\n{root_text(EMPTY_ROOT)}\n").size == 0
