"""What `bmoe flash` refuses before anything is written: each one clear line, and the exit status of bad input."""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from flash_helpers import TOKEN, refused
from image_maker import make_image

from bmoe.protocol.join_token import JoinToken
from coordinator.flash.source import zstd

PACK: dict[str, Callable[[bytes], bytes]] = {
    "xz": functools.partial(lzma.compress, preset=0),
    "zst": zstd.compress,
    "gz": functools.partial(gzip.compress, compresslevel=1),
}
Capture = pytest.CaptureFixture[str]


def attempt(capsys: Capture, monkeypatch: pytest.MonkeyPatch, image: Path, *words: object) -> str:
    """The line with which the image is refused; exit status 2, and no card."""
    card = image.with_name("card.img")
    given = ["--board", "rpi5", "--image", image, "--output", card, "--token", TOKEN.text(), *words]
    status, line = refused(capsys, monkeypatch, *given)
    assert status == 2 and not card.exists()
    return line


def test_an_unknown_board(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    status, line = refused(capsys, monkeypatch, "--board", "rpi9", "--token", TOKEN.text(), "--output", "x")
    assert status == 2 and "there is no board 'rpi9'; there are: " in line and "rpi5" in line


def test_a_wrong_checksum_given_or_beside_the_image(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(tmp_path / "system.img").path
    right, wrong = hashlib.sha256(image.read_bytes()).hexdigest(), "ab" * 32
    assert f"has the SHA-256 {right}, expected {wrong}" in attempt(capsys, monkeypatch, image, "--sha256", wrong)
    beside = tmp_path / "system.img.sha256"
    beside.write_text(f"{wrong} *system.img\n")
    assert "download it again" in attempt(capsys, monkeypatch, image)
    beside.write_text("<html>404</html>\n")
    assert "names no SHA-256 for system.img" in attempt(capsys, monkeypatch, image)
    assert "64 hexadecimal digits" in attempt(capsys, monkeypatch, image, "--sha256", "abc")


@pytest.mark.parametrize("kind", list(PACK))
def test_a_truncated_archive(kind: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PACK[kind](make_image(tmp_path / "system.img").path.read_bytes())
    archive = tmp_path / f"system.img.{kind}"
    for length in (len(data) - 1, len(data) // 2, 12):
        archive.write_bytes(data[:length])
        assert f"is cut short: the .{kind} archive ends before its end mark" in attempt(capsys, monkeypatch, archive)
    archive.write_bytes(data[:6] + b"\xff" * 8 + data[14:])
    assert "is damaged" in attempt(capsys, monkeypatch, archive)
    archive.write_bytes(b"<html>not found</html>")
    assert "is damaged: no" in attempt(capsys, monkeypatch, archive)


def test_a_truncated_image(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image(tmp_path / "system.img").path
    with image.open("r+b") as file:
        file.truncate(9 << 20)
    assert "is cut short: partition 2 ends at byte 10485760, the image at 9437184" in attempt(
        capsys, monkeypatch, image
    )


@pytest.mark.parametrize(("machine", "named"), [(0x28, "32-bit ARM"), (0x3E, "x86_64"), (0xF3, "RISC-V")])
def test_a_wrong_architecture_is_seen_by_the_programs_in_the_image(
    machine: int, named: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 32-bit Raspberry Pi OS has a 64-bit kernel too: the boot partition alone tells nothing."""
    image = make_image(tmp_path / "system.img", machine=machine).path
    assert f"system.img is for {named}, Raspberry Pi 5 runs aarch64" in attempt(capsys, monkeypatch, image)


def test_an_image_for_another_kind_of_board(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image(tmp_path / "system.img").path
    image.write_bytes(image.read_bytes().replace(b"bootfs     ", b"EFI        "))
    line = attempt(capsys, monkeypatch, image)
    assert "no FAT partition labelled bootfs or system-boot" in line and "partition 1 is labelled 'EFI'" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"PK\3\4" + bytes(600), "is a .zip"),
        (bytes(2 << 20), "has no partition table"),
        (bytes(510) + b"\x55\xaa" + bytes(1 << 20), "partition table is empty"),
    ],
)
def test_what_is_no_image(
    content: bytes, said: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "system.img").write_bytes(content)
    assert said in attempt(capsys, monkeypatch, tmp_path / "system.img")


TOKENS = [
    ("cut short", TOKEN.text()[:-9], "damaged or cut short"),
    ("with a letter changed", TOKEN.text()[:-30] + "!" + TOKEN.text()[-29:], "copy it whole"),
    ("of something else", "bmoek.abcdef", "a join token begins with"),
]


@pytest.mark.parametrize(("token", "said"), [case[1:] for case in TOKENS], ids=[case[0] for case in TOKENS])
def test_a_damaged_token(
    token: str, said: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(tmp_path / "system.img").path
    status, line = refused(
        capsys, monkeypatch, "--board", "rpi5", "--image", image, "--output", tmp_path / "c", "--token", token
    )
    assert status == 2 and said in line and token not in line


def test_a_gateway_that_every_board_takes_for_itself(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = JoinToken("https://127.0.0.1:8443", TOKEN.token, TOKEN.secret, TOKEN.pin).text()
    words = ["--board", "rpi5", "--image", tmp_path / "i", "--device", "/dev/null", "--token", token]
    assert "every board's own address" in refused(capsys, monkeypatch, *words)[1]
    assert "must be like https://" in refused(capsys, monkeypatch, *words, "--gateway", "http://192.168.1.10")[1]


OPTIONS = [
    (["--name", "Kitchen Pi"], "a device's name has"),
    (["--hostname", "pi.local"], "a host's name has"),
    (["--timezone", "../../etc/passwd"], "a timezone is spelled like"),
    (["--timezone", "Europe/Belrin"], "there is no timezone 'Europe/Belrin'"),
    (["--wifi-ssid", "home"], "--wifi-country takes two capital letters"),
    (["--wifi-country", "DE"], "go with --wifi-ssid"),
    (["--wifi-ssid", "x" * 33, "--wifi-country", "DE"], "a Wi-Fi name has 1..32 bytes"),
    (["--wifi-ssid", "home", "--wifi-country", "DE", "--wifi-password", "short"], "8..63 ASCII characters"),
    (["--sha256", "zz"], "64 hexadecimal digits"),
]


@pytest.mark.parametrize(("words", "said"), OPTIONS)
def test_a_setting_that_cannot_be(
    words: list[str], said: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "system.img"
    image.write_bytes(b"\0")
    line = attempt(capsys, monkeypatch, image, *words)
    assert said in line and "short" not in line


def test_a_private_key_is_not_put_on_a_card(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    image, key = tmp_path / "system.img", tmp_path / "id"
    image.write_bytes(b"\0")
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n")
    line = attempt(capsys, monkeypatch, image, "--ssh-key", key)
    assert "is a private key: give the public one, id.pub" in line and "c2VjcmV0" not in line
    key.write_text("hello")
    assert "expected one public key" in attempt(capsys, monkeypatch, image, "--ssh-key", key)


def test_wheels_for_another_processor_or_two_of_bmoe(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, wheels = tmp_path / "system.img", tmp_path / "wheels"
    image.write_bytes(b"\0")
    wheels.mkdir()
    assert "has no wheels" in attempt(capsys, monkeypatch, image, "--wheels", wheels)
    (wheels / "bmoe-0.1.0-py3-none-any.whl").write_bytes(b"")
    (wheels / "numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"")
    line = attempt(capsys, monkeypatch, image, "--wheels", wheels)
    assert "numpy-2.4.6" in line and "which runs aarch64" in line
    (wheels / "bmoe-0.2.0-py3-none-any.whl").write_bytes(b"")
    assert "more than one wheel of bmoe" in attempt(capsys, monkeypatch, image, "--wheels", wheels)


def test_a_card_that_is_there_already_is_not_overwritten(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, card = make_image(tmp_path / "system.img").path, tmp_path / "old.img"
    card.write_bytes(b"precious")
    words = ["--board", "rpi5", "--image", image, "--output", card, "--token", TOKEN.text()]
    status, line = refused(capsys, monkeypatch, *words)
    assert status == 2 and "is there already" in line and card.read_bytes() == b"precious"
    words[words.index(card)] = tmp_path / "nowhere" / "card.img"
    assert "cannot be made: No such file or directory" in refused(capsys, monkeypatch, *words)[1]
