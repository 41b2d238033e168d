"""A card written to a file: for each kind of system the right files are in it, and nothing else differs from the image."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import image_maker
import numpy as np
import pytest
from flash_helpers import NOW_S, TOKEN, away, check_ext4, check_fat, check_table, flashed
from image_maker import CMDLINE, Made, make_image

from bmoe.protocol.errors import ImageError, LimitError, RefusedError
from bmoe.protocol.join_token import JoinToken
from coordinator.boards import load_board
from coordinator.cli.commands import run
from coordinator.flash import flash as flashing
from coordinator.flash import overlay
from coordinator.flash.fat import Fat
from coordinator.flash.gateway import Standing
from coordinator.flash.overlay import PLACE

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHV0dGVybHkgd2l0aG91dCBtZWFuaW5n operator@desk"
# PBKDF2 of IEEE 802.11i, annex J.4: the second of its own test vectors.
VECTOR = ("ThisIsASSID", "ThisIsAPassword", "0dc0d6eb90555ed6419756b9a15ec3e3209b63df707dd508d14581f8982721af")


class Image:
    """Random access to a finished card."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size].ljust(size, b"\0")


def wishes(folder: Path) -> dict[str, Any]:
    """Everything that can be wished for."""
    (folder / "key.pub").write_text(SSH_KEY + "\n")
    wheels = folder / "wheels"
    wheels.mkdir()
    (wheels / "bmoe-0.1.0-py3-none-any.whl").write_bytes(os.urandom(70_000))
    (wheels / "onnxruntime-1.32.0-cp313-cp313-manylinux_2_28_aarch64.whl").write_bytes(os.urandom(40_000))
    return {
        "name": "kitchen", "timezone": "Europe/Berlin", "wifi_ssid": VECTOR[0], "wifi_password": VECTOR[1],
        "wifi_country": "DE", "ssh_key": folder / "key.pub", "wheels": wheels,
    }  # fmt: skip


def differing(image: Path, card: Path) -> np.ndarray:
    """The sectors in which the card is not the image."""
    one, other = (np.fromfile(path, "u1").reshape(-1, 512) for path in (image, card))
    assert one.shape == other.shape
    return np.flatnonzero((one != other).any(axis=1))


@pytest.mark.parametrize("system", ["bookworm", "first-trixie", "trixie", "ubuntu"])
def test_every_byte_outside_the_files_put_there_is_the_images(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, card = make_image(tmp_path / "system.img", system), tmp_path / "card.img"
    before = Fat(Image(made.path), made.boot[0], made.boot[1] - made.boot[0])
    _, facts = flashed(monkeypatch, made.path, card, **wishes(tmp_path))
    fat = Fat(Image(card), made.boot[0], made.boot[1] - made.boot[0])
    put = {fact["path"]: fact["bytes"] for fact in facts["files"]}
    assert all(len(fat.read(path) or b"") == size for path, size in put.items())
    for folder in ("", "overlays"):
        for name in before.names(folder):
            path = f"{folder}/{name}".lstrip("/")
            assert path in put or fat.read(path) == before.read(path)
    _only_they_changed(made, card, fat, put)
    check_table(card)
    data = card.read_bytes()
    for checker, (begin, end) in ((check_fat, made.boot), (check_ext4, made.root)):
        (tmp_path / "part").write_bytes(data[begin:end])
        checker(tmp_path / "part")


def _only_they_changed(made: Made, card: Path, fat: Fat, put: dict[str, int]) -> None:
    """Changed sectors are: both tables, the counter of free clusters, folders, and the clusters of the files themselves."""
    geometry, base = fat.geometry, made.boot[0] // 512
    allowed = {base + 1, *range(base + geometry.reserved, base + geometry.data_at)}
    folders = {path.rpartition("/")[0] for path in put} | {path.split("/")[0] for path in put if "/" in path}
    for path in [*put, *(folder for folder in folders if folder)]:
        entry = fat._find(path)
        assert entry is not None
        allowed |= {base + s for c in fat._table.chain(entry.cluster) for s in geometry.sectors(c)}
    if geometry.root_cluster:
        allowed |= {base + s for c in fat._table.chain(geometry.root_cluster) for s in geometry.sectors(c)}
    assert set(differing(made.path, card).tolist()) <= allowed


def contents(made: Made, card: Path) -> Fat:
    return Fat(Image(card), made.boot[0], made.boot[1] - made.boot[0])


def test_bookworm_and_the_first_trixie_are_told_by_firstrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img", "first-trixie"), tmp_path / "card.img"
    flashed(monkeypatch, made.path, card, **wishes(tmp_path))
    fat = contents(made, card)
    line = (fat.read("cmdline.txt") or b"").decode()
    assert line.startswith(CMDLINE[:-1].decode()) and line.count("\n") == 1
    assert line.split()[-4:] == [
        "systemd.run=/boot/firmware/firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
        "cfg80211.ieee80211_regdom=DE",
    ]
    script = (fat.read("firstrun.sh") or b"").decode()
    for part in ("hostname=kitchen\n", "timezone=Europe/Berlin\n", "country=DE\n", "ssh=yes\n", 'install.sh" --enable'):
        assert part in script
    assert (fat.read("bmoe/authorized_keys") or b"").decode() == SSH_KEY + "\n"
    assert f"psk={VECTOR[2]}\n" in (fat.read("bmoe/wifi.nmconnection") or b"").decode()
    assert not fat.exists("user-data")


@pytest.mark.parametrize("system", ["trixie", "ubuntu"])
def test_later_trixie_and_ubuntu_are_told_by_cloud_init(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, card = make_image(tmp_path / "system.img", system), tmp_path / "card.img"
    flashed(monkeypatch, made.path, card, **wishes(tmp_path))
    fat = contents(made, card)
    identity = (fat.read("meta-data") or b"").decode().removeprefix("instance-id: ").strip()
    assert identity.startswith(f"bmoe-{NOW_S}-")
    for path in ("cmdline.txt", "current/cmdline.txt") if system == "ubuntu" else ("cmdline.txt",):
        words = (fat.read(path) or b"").decode().split()
        assert words[-2:] == [f"ds=nocloud;i={identity}", "cfg80211.ieee80211_regdom=DE"]
    lines = (fat.read("user-data") or b"").decode().splitlines()
    assert (
        lines[0] == "#cloud-config"
        and "ssh_pwauth: false" in lines
        and 'hostname: "kitchen"' in lines
        and f'  - "{SSH_KEY}"' in lines
    )
    command = json.loads(lines[-1].removeprefix("  - "))
    assert command[:2] == ["sh", "-c"] and command[2].endswith("sh /boot/firmware/bmoe/install.sh --enable --now")
    network = json.loads((fat.read("network-config") or b"").decode().split("network: ", 1)[1])
    assert network["wifis"]["wlan0"]["access-points"] == {VECTOR[0]: {"password": VECTOR[2]}}
    assert not fat.exists("firstrun.sh")


def test_the_card_holds_token_and_pin_and_no_other_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img", "trixie"), tmp_path / "card.img"
    flashed(monkeypatch, made.path, card, **wishes(tmp_path))
    fat = contents(made, card)
    assert (fat.read("bmoe/token") or b"").decode().strip() == TOKEN.text()
    assert (fat.read("bmoe/issued_at") or b"").decode().strip() == str(NOW_S)
    assert (fat.read("bmoe/name") or b"").decode().strip() == "kitchen"
    data = card.read_bytes()
    assert VECTOR[1].encode() not in data and b"PRIVATE KEY" not in data
    assert data.count(TOKEN.text().encode()) == 1  # not in cloud-init's files, which it copies


def test_the_board_bears_the_name_that_its_token_is_bound_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"

    def bound(token: JoinToken, name: str) -> Standing:
        return Standing("pantry", "ada", (NOW_S + 3600) * 1000)

    said, facts = flashed(monkeypatch, made.path, card, ask=bound)
    assert "the token is good for 1.0 more hours: pantry, owner ada" in said and facts["token_checked"]
    assert contents(made, card).read("bmoe/name") == b"pantry\n"
    assert b"hostname=pantry\n" in (contents(made, card).read("firstrun.sh") or b"")
    with pytest.raises(RefusedError, match="the token is for pantry, not for kitchen"):
        flashed(monkeypatch, made.path, tmp_path / "other.img", ask=bound, name="kitchen")


def test_a_card_that_was_made_before_is_no_image_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys for Wi-Fi and ssh, and once it has joined those of the device, would be on every card made of it."""
    made, first = make_image(tmp_path / "system.img", "trixie"), tmp_path / "1.img"
    flashed(monkeypatch, made.path, first)
    with pytest.raises(ImageError, match="was made into a card before"):
        flashed(monkeypatch, first, tmp_path / "2.img", name="pantry")


def test_another_programs_words_of_the_command_line_are_not_said_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that Raspberry Pi Imager had prepared for cloud-init."""
    made, card = make_image(tmp_path / "system.img", "trixie"), tmp_path / "card.img"
    data = made.path.read_bytes()
    theirs = CMDLINE.replace(b"rootwait quiet", b"ds=nocloud;i=x")
    assert data.count(CMDLINE) == 1 and len(theirs) == len(CMDLINE)
    made.path.write_bytes(data.replace(CMDLINE, theirs))
    flashed(monkeypatch, made.path, card)
    words = (contents(made, card).read("cmdline.txt") or b"").decode().split()
    assert [word.startswith("ds=nocloud;i=bmoe-") for word in words if word.startswith("ds=")] == [True]


@pytest.mark.parametrize("kind", ["xz", "zst", "gz"])
def test_an_archive_gives_the_card_that_its_image_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.flash.source import zstd

    made, plain, packed = make_image(tmp_path / "system.img"), tmp_path / "1.img", tmp_path / "2.img"
    data = made.path.read_bytes()
    half = len(data) // 2 + 77  # two streams in one file, as parallel packers write
    pack = {
        "xz": partial(lzma.compress, preset=0),
        "zst": zstd.compress,
        "gz": partial(gzip.compress, compresslevel=1),
    }[kind]
    archive = tmp_path / f"system.img.{kind}"
    archive.write_bytes(pack(data[:half]) + pack(data[half:]))
    flashed(monkeypatch, made.path, plain)
    flashed(monkeypatch, archive, packed)
    assert plain.read_bytes() == packed.read_bytes()


def test_dry_run_shows_every_change_and_no_secret_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    said, facts = flashed(monkeypatch, made.path, card, dry_run=True, **wishes(tmp_path))
    text = "\n".join(said)
    assert all(fact["path"] in text for fact in facts["files"]) and said[-1] == "nothing was written"
    assert "+hostname=kitchen" in text and "-console=serial0" in text
    assert TOKEN.text() not in text and VECTOR[1] not in text and VECTOR[2] not in text
    assert not card.exists()


def test_an_image_with_a_gpt_serves_a_generic_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img", "trixie", gpt=True), tmp_path / "card.img"
    flashed(monkeypatch, made.path, card, board=load_board("generic-aarch64"))
    assert contents(made, card).exists("bmoe/token")


def test_debians_own_image_is_reached_by_the_label_that_cloud_init_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no partition for such files but the EFI system partition, which has no label."""
    made, card = make_image(tmp_path / "debian.raw", "debian", gpt=True), tmp_path / "card.img"
    said, facts = flashed(monkeypatch, made.path, card, **wishes(tmp_path) | {"board": load_board("generic-aarch64")})
    fat = contents(made, card)
    assert fat.label == fat.geometry.label == "CIDATA" and facts["method"] == "cloud-init"
    assert "changed the label of partition 1, the EFI system partition, to CIDATA" in said
    assert "mount -L CIDATA /boot/firmware" in (fat.read("user-data") or b"").decode()
    assert fat.read("EFI/grub.cfg") == image_maker.EFI["EFI/grub.cfg"]
    data = card.read_bytes()
    for checker, (begin, end) in ((check_fat, made.boot), (check_ext4, made.root)):
        (tmp_path / "part").write_bytes(data[begin:end])
        checker(tmp_path / "part")


def test_an_image_of_debian_without_cloud_init_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would happen at its first boot, and nobody would know why."""
    made = make_image(tmp_path / "debian.raw", "debian", gpt=True)
    made.path.write_bytes(made.path.read_bytes().replace(b"cloud-init-local", b"other-unit-here1"))
    with pytest.raises(ImageError, match="holds no cloud-init"):
        flashed(monkeypatch, made.path, tmp_path / "card.img", board=load_board("generic-aarch64"))
    with pytest.raises(ImageError, match="no FAT partition labelled bootfs"):
        flashed(monkeypatch, made.path, tmp_path / "card.img", board=load_board("rpi5"))


def test_an_overlay_that_is_not_finished_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = wishes(tmp_path) | {"board": load_board("jetson-orin-nano")}
    real = overlay.template
    monkeypatch.setattr(overlay, "template", lambda name, **v: real(name, **v) if name != "jetson-apply.sh" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flashed(monkeypatch, None, tmp_path / "overlay", **given)
    assert not (tmp_path / "overlay").exists()


def test_a_boot_partition_within_the_first_block_is_changed_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older tools lay partitions out: from sector 63 on, so that tables and root folder are written last."""
    monkeypatch.setattr(image_maker, "BOOT_AT", 63 * 512)
    image_maker._parts.cache_clear()
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    image_maker._parts.cache_clear()
    flashed(monkeypatch, made.path, card)
    assert (contents(made, card).read("bmoe/token") or b"").decode().strip() == TOKEN.text()
    assert card.read_bytes()[:510] == made.path.read_bytes()[:510]


def test_wheels_beyond_the_boot_partitions_room_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, wheels = make_image(tmp_path / "system.img"), tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "bmoe-0.1.0-py3-none-any.whl").write_bytes(bytes(6 << 20))
    with pytest.raises(LimitError, match=r"the boot partition has \d+ bytes free, \d+ are wanted"):
        flashed(monkeypatch, made.path, tmp_path / "card.img", wheels=wheels)


def test_the_command_says_how_far_it_is_and_prints_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    monkeypatch.setattr(flashing, "ask", away)
    (tmp_path / "token").write_text(TOKEN.text() + "\n")
    words = ["--board", "rpi4", "--image", made.path, "--output", card, "--token-file", tmp_path / "token", "--json"]
    monkeypatch.setattr(sys, "argv", ["bmoe", "flash", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run()
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert end.value.code == 0 and facts["ok"] and facts["verified"] and facts["token_checked"] is False
    assert facts["method"] == "firstrun" and facts["target"] == str(card) and card.stat().st_mode & 0o777 == 0o600
    for phase in ("read", "write", "verify"):
        assert f"{phase} 100 % (10485760 of 10485760 bytes)" in said.err


def test_a_jetson_gets_an_overlay_for_nvidias_flasher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = wishes(tmp_path) | {"board": load_board("jetson-orin-nano")}
    said, _ = flashed(monkeypatch, None, tmp_path / "overlay", **given)
    with tarfile.open(tmp_path / "overlay" / "overlay.tar") as tar:
        entries = {entry.name: entry for entry in tar}
        token = tar.extractfile(f"{PLACE}/bmoe/token")
        assert token is not None and token.read().decode().strip() == TOKEN.text()
        unit = tar.extractfile("etc/systemd/system/bmoe-first-boot.service")
        assert unit is not None and f"ExecStart=/bin/sh /{PLACE}/bmoe/install.sh" in unit.read().decode()
    assert {entry.uid for entry in entries.values()} == {0} and entries[f"{PLACE}/bmoe/token"].mode == 0o600
    wanted = entries["etc/systemd/system/multi-user.target.wants/bmoe-first-boot.service"]
    assert wanted.linkname == "../bmoe-first-boot.service"
    assert (tmp_path / "overlay").stat().st_mode & 0o777 == 0o700
    assert "apply.sh" in said[-2]
