"""Signing keys: weak ones are refused, kept ones survive, damaged ones are one clear line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bmoe.protocol import files
from bmoe.protocol.errors import ConfigError, MessageError
from bmoe.protocol.files import write_durably
from bmoe.protocol.keys import Signer, check_public_key, key_id, verify_ed25519

P = 2**255 - 19
ORDER_8 = (
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
)


def _encoded(y: int, sign: int = 0) -> bytes:
    return (y | sign << 255).to_bytes(32, "little")


SMALL = {
    "neutral": _encoded(1),
    "order 2": _encoded(P - 1),
    "order 4": _encoded(0),
    "order 4, negative": _encoded(0, 1),
    **{f"order 8, {i}{' negative' if s else ''}": bytes(
        [*bytes.fromhex(h)[:31], bytes.fromhex(h)[31] | s << 7]) for i, h in enumerate(ORDER_8) for s in (0, 1)},
}  # fmt: skip


def test_openssl_believes_a_forgery_under_a_small_order_key() -> None:
    """Why we check: one fixed signature by nobody is good for every message under the neutral element."""
    forged = _encoded(1) + bytes(32)
    for message in (b"pay me", b"anything"):
        assert Ed25519PublicKey.from_public_bytes(SMALL["neutral"]).verify(forged, message) is None
        with pytest.raises(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(Signer.generate().public_key).verify(forged, message)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_eight_points_of_small_order_are_refused(name: str) -> None:
    assert len(SMALL) == 8
    with pytest.raises(MessageError, match="small order"):
        check_public_key(SMALL[name])


@pytest.mark.parametrize("y", [P, P + 1, P + 9, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 1])
def test_a_second_encoding_of_a_key_is_refused(y: int, sign: int) -> None:
    with pytest.raises(MessageError, match="canonical"):
        check_public_key(_encoded(y, sign))


@pytest.mark.parametrize("sign_of_zero", [_encoded(1, 1), _encoded(P - 1, 1)])
def test_a_negative_zero_is_refused(sign_of_zero: bytes) -> None:
    with pytest.raises(MessageError, match="small order"):
        check_public_key(sign_of_zero)


@pytest.mark.parametrize("wrong", [b"", bytes(31), bytes(33), "a" * 32, 5, None])
def test_what_is_no_key_at_all_is_refused(wrong: object) -> None:
    with pytest.raises(MessageError, match="must be 32 bytes, got"):
        check_public_key(wrong)  # type: ignore[arg-type]


def test_real_keys_pass_and_sign() -> None:
    for i in range(1, 40):
        signer = Signer.from_bytes(bytes([i] * 32))
        assert check_public_key(signer.public_key) == signer.public_key
        assert signer.key_id == key_id(signer.public_key) and len(signer.key_id) == 8
        assert verify_ed25519(signer.public_key, signer.sign(b"m"), b"m")
        assert not verify_ed25519(signer.public_key, signer.sign(b"m"), b"n")
    assert not verify_ed25519(_encoded(2), bytes(64), b"no point of the curve")
    assert not verify_ed25519(signer.public_key, b"", b"m")


def test_a_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "signing.key"
    first = Signer.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Signer.load_or_create(path).public_key == first.public_key == Signer.load(path).public_key
    assert [p.name for p in path.parent.iterdir()] == ["signing.key"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds 0"), (bytes([7] * 31), "holds 31"), (b"x" * 64, "holds 64"), (bytes(32), "only zeros")],
)
def test_a_damaged_key_is_one_clear_line_and_is_never_replaced(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "signing.key"
    path.write_bytes(content)
    for load in (Signer.load, Signer.load_or_create):
        with pytest.raises(ConfigError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_an_absent_or_unreadable_key_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was this device enrolled"):
        Signer.load(tmp_path / "none.key")
    (tmp_path / "folder.key").mkdir()
    for load in (Signer.load, Signer.load_or_create):
        with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
            load(tmp_path / "folder.key")


def test_a_durable_write_leaves_the_old_bytes_when_it_dies_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    write_durably(path, b"old")

    def died(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", died)
    with pytest.raises(OSError, match="power cut"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_the_folders_that_hold_a_file_are_made_durable_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = files.sync_folder
    monkeypatch.setattr(files, "sync_folder", lambda folder: (synced.append(folder), real(folder)))
    write_durably(tmp_path / "a" / "b" / "file", b"data")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
