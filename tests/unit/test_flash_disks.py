"""Which disk is written to, and which never: on trees of files that look like /sys and /proc. No disk is touched here."""

from __future__ import annotations

import contextlib
import os
import stat
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_disks import USB, Machine, card
from flash_helpers import NOW_S, TOKEN, away
from image_maker import make_image

from bmoe.protocol.errors import BmoeError, ConfigError, RefusedError
from coordinator.boards import load_board
from coordinator.flash import flash as flashing
from coordinator.flash import write
from coordinator.flash.disks import check_disk, confirm, find_disk
from coordinator.flash.flash import Desk, Wishes, flash
from coordinator.flash.write import opened

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_a_card_in_a_usb_reader_is_taken_and_described(machine: Machine) -> None:
    card(machine)
    disk = find_disk(Path("/dev/sda"), machine.root)
    check_disk(disk, 4 * GIB)
    assert (disk.serial, disk.bytes, disk.removable, disk.whole) == ("000000001206", 32 * GIB, True, True)
    assert disk.describe() == "/dev/sda: Generic SD Reader, 34.4 GB, serial 000000001206"


def test_a_card_in_a_slot_of_the_machine_is_taken_by_its_own_serial_number(machine: Machine) -> None:
    machine.disk("mmcblk0", "platform/mmc0/mmc0:aaaa", 16 * GIB, device__type="SD", device__serial="0x5d3a7e21",
                 device__name="SC16G")  # fmt: skip
    disk = find_disk(Path("/dev/mmcblk0"), machine.root)
    check_disk(disk, GIB)
    assert disk.identity == "0x5d3a7e21" and disk.model == "SC16G"


def mounted(where: str) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.mount(card(machine) / "sda1", where)

    return prepare


def held(machine: Machine) -> None:
    (card(machine) / "sda1" / "holders" / "dm-0").mkdir()


def swapped(machine: Machine) -> None:
    card(machine)
    machine.swaps("sda1")


def fixed(machine: Machine) -> None:
    machine.disk("sda", "pci0000:00/ata1/host0/target0:0:0/0:0:0:0", 500 * GIB)


def nvme(machine: Machine) -> None:
    machine.disk("sda", "pci0000:00/nvme/nvme0", 500 * GIB)


def known_by_its_source(machine: Machine) -> None:
    """btrfs and overlays have a number of their own in mountinfo; the device stands behind the dash."""
    card(machine)
    (machine.root / "proc/self/mountinfo").write_text("20 1 0:31 / /home rw - btrfs /dev/sda1 rw,subvol=/home\n")


def emmc(machine: Machine) -> None:
    machine.disk("sda", "platform/mmc1/mmc1:0001", 32 * GIB, device__type="MMC", removable="1")


def loop(machine: Machine) -> None:
    machine.disk("sda", "virtual", 8 * GIB, removable="1")


REFUSALS: list[tuple[str, Callable[[Machine], Any], str]] = [
    ("the disk of /", mounted("/"), "is a disk of this system: / is on it"),
    ("the disk of /home", mounted("/home"), "is a disk of this system: /home is on it"),
    ("the disk of a /home on btrfs", known_by_its_source, "is a disk of this system: /home is on it"),
    ("a mounted card", mounted("/media/my card"), "is mounted on /media/my card: unmount it first"),
    ("a disk with swap", swapped, "is a disk of this system: it swaps on sda1"),
    ("a disk of LVM, RAID or encryption", held, "is held by dm-0"),
    ("a disk in the machine", fixed, "is not removable"),
    ("an NVMe disk", nvme, "is not removable"),
    ("soldered eMMC that calls itself removable", emmc, "is not removable"),
    ("a loop device", loop, "is not removable"),
    ("a card whose lock is on", lambda m: card(m, ro="1"), "is read-only"),
    ("a reader without a card", lambda m: card(m, size=0), "has no medium in it"),
    ("a disk of large sectors", lambda m: card(m, queue__logical_block_size="4096"), "has sectors of 4096 bytes"),
    ("a card that is too small", lambda m: card(m, size=4 << 20), r"has 4194304 bytes, the image needs 10485760"),
]


@pytest.mark.parametrize(("prepare", "said"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_such_a_disk_is_never_opened(
    prepare: Callable[[Machine], Any],
    said: str,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(machine)
    image = make_image(tmp_path / "system.img").path
    monkeypatch.setattr(flashing, "ask", away)
    monkeypatch.setattr(flashing, "opened", lambda *_: pytest.fail("the disk was opened"))
    desk = Desk(lambda line: None, lambda phase: lambda done, total: None, None, machine.root, lambda: NOW_S)
    wishes = Wishes(load_board("rpi5"), image, Path("/dev/sda"), None, TOKEN.text(), confirm_serial="000000001206")
    with pytest.raises(RefusedError, match=said) as told:
        flash(wishes, desk)
    assert "\n" not in str(told.value) and str(told.value).startswith("/dev/sda ")


def test_a_partition_is_not_a_disk(machine: Machine) -> None:
    card(machine)
    with pytest.raises(RefusedError, match="is a partition: give the whole disk"):
        check_disk(find_disk(Path("/dev/sda1"), machine.root), GIB)


@pytest.mark.parametrize("path", ["/dev/sdz", "/dev/null", "/etc/passwd", "/dev/../dev/.."])
def test_what_is_no_disk_is_told_with_those_there_are(path: str, machine: Machine) -> None:
    card(machine)
    with pytest.raises(ConfigError, match=r"is no disk of this machine; there are: sda"):
        find_disk(Path(path), machine.root)


def test_a_link_to_a_system_disk_is_that_disk(machine: Machine) -> None:
    machine.mount(card(machine) / "sda1", "/")
    (machine.root / "dev/innocent").symlink_to(machine.root / "dev/sda")
    with pytest.raises(RefusedError, match="is a disk of this system"):
        check_disk(find_disk(Path("/dev/innocent"), machine.root), GIB)


def test_another_disks_serial_number_confirms_nothing(machine: Machine) -> None:
    card(machine)
    disk = find_disk(Path("/dev/sda"), machine.root)
    confirm(disk, "000000001206\n")
    for wrong in ("", "yes", "00000000120", "sda"):
        with pytest.raises(RefusedError, match="nothing was written"):
            confirm(disk, wrong)


def test_a_serial_number_that_two_slots_of_a_reader_share_does_not_say_which(machine: Machine) -> None:
    """A reader has one serial number and a disk for each slot: in the other may be somebody's photographs."""
    card(machine)
    machine.disk("sdb", USB + ":1", 32 * GIB, removable="1")
    one, other = (find_disk(Path(f"/dev/sd{letter}"), machine.root) for letter in "ab")
    assert (one.identity, other.identity) == ("000000001206-sda", "000000001206-sdb")
    with pytest.raises(RefusedError, match="nothing was written"):
        confirm(one, other.identity)


def test_what_a_disk_calls_itself_does_not_write_on_the_terminal(machine: Machine) -> None:
    (card(machine) / "device/model").write_text("SD\x1b[2J\x1b[Hnvme0n1")
    assert "\x1b" not in find_disk(Path("/dev/sda"), machine.root).describe()


def other_card(machine: Machine, device: Path) -> None:
    (device / "diskseq").write_text("8\n")


def other_reader(machine: Machine, device: Path) -> None:
    (machine.root / "sys/devices/pci0000:00/0000:00:14.0/usb1/1-2/serial").write_text("BACKUP-2TB\n")


def now_mounted(machine: Machine, device: Path) -> None:
    machine.mount(device / "sda1", "/media/card")


@pytest.mark.parametrize(
    ("meanwhile", "said"),
    [
        (now_mounted, "is mounted on /media/card"),  # desktops mount what is put in, and reading takes minutes
        (other_card, "its sequence was '7', is '8'"),
        (other_reader, "its identity was '000000001206', is 'BACKUP-2TB'"),
    ],
)
def test_a_disk_that_became_another_one_while_the_user_was_asked_is_not_written_to(
    meanwhile: Callable[[Machine, Path], None],
    said: str,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was confirmed is what was shown: the same name and size may be another person's disk by now."""
    device = card(machine, diskseq="7")
    monkeypatch.setattr(flashing, "ask", away)
    monkeypatch.setattr(flashing, "opened", lambda *_: pytest.fail("the disk was opened"))

    def asked(question: str) -> str:
        meanwhile(machine, device)
        return "000000001206"

    desk = Desk(lambda line: None, lambda phase: lambda done, total: None, asked, machine.root)
    wishes = Wishes(load_board("rpi5"), make_image(tmp_path / "i.img").path, Path("/dev/sda"), None, TOKEN.text())
    with pytest.raises(RefusedError, match=said):
        flash(wishes, desk)


def test_a_disk_that_is_another_users_is_told_before_the_image_is_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes later, after the serial number was typed, would be late. A dry run needs no rights."""
    card(machine)
    monkeypatch.setattr(flashing, "ask", away)
    monkeypatch.setattr(flashing.os, "access", lambda path, mode: path != machine.root / "dev/sda")
    desk = Desk(lambda line: None, lambda phase: lambda done, total: None, None, machine.root)
    wishes = Wishes(load_board("rpi5"), Path("/nowhere"), Path("/dev/sda"), None, TOKEN.text())
    with pytest.raises(RefusedError, match="run this as root"):
        flash(wishes, desk)
    with pytest.raises(ConfigError, match="/nowhere cannot be read"):
        flash(replace(wishes, dry_run=True), desk)


def test_a_disk_without_a_serial_number_is_confirmed_by_name_and_size(machine: Machine) -> None:
    machine.disk("sdb", USB.replace("1-2", "1-3"), 8 * GIB, removable="1")
    assert find_disk(Path("/dev/sdb"), machine.root).identity == f"sdb-{8 * GIB}"


def test_nobody_to_ask_and_no_confirmation_is_one_line_that_says_what_to_give(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(machine)
    monkeypatch.setattr(flashing, "ask", away)
    desk = Desk(lambda line: None, lambda phase: lambda done, total: None, None, machine.root)
    wishes = Wishes(load_board("rpi5"), make_image(tmp_path / "i.img").path, Path("/dev/sda"), None, TOKEN.text())
    with pytest.raises(ConfigError, match="confirm with --confirm-serial 000000001206"):
        flash(wishes, desk)


def test_a_file_in_the_disks_place_is_not_opened_for_it(machine: Machine, tmp_path: Path) -> None:
    """What is opened must be the very block device that was looked at."""
    card(machine)
    disk = find_disk(Path("/dev/sda"), machine.root)
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    with pytest.raises(RefusedError, match="is not the disk that was looked at"), opened(file, disk):
        pytest.fail("opened")
    assert file.read_bytes() == b"precious"


def test_a_disk_is_opened_exclusively_and_neither_made_nor_emptied(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O_EXCL without O_CREAT has the kernel refuse a disk of which anything is mounted or held, wherever (open(2))."""
    card(machine)
    disk, file, real, flags = find_disk(Path("/dev/sda"), machine.root), tmp_path / "file", os.open, []
    file.write_bytes(b"precious")
    monkeypatch.setattr(write, "_same_disk", lambda handle, disk: None)
    monkeypatch.setattr(write.os, "open", lambda path, given, mode: (flags.append(given), real(path, given, mode))[1])
    with opened(file, disk):
        assert flags == [os.O_RDWR | os.O_CLOEXEC | os.O_EXCL]
    monkeypatch.undo()
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("device", "size", "sequence", "said"),
    [
        (0x801, 32 * GIB, 7, None),
        (0x810, 32 * GIB, 7, "found 8:16, expected 8:1"),
        (0x801, 64 * GIB, 7, f"has {64 * GIB} bytes now, {32 * GIB} when"),
        (0x801, 32 * GIB, 9, "has 9 as its number now, 7 when"),
    ],
)
def test_what_is_opened_is_what_was_looked_at(
    device: int, size: int, sequence: int, said: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the opening another disk may have taken the name, or another card the slot."""
    card(machine, diskseq="7")
    disk = find_disk(Path("/dev/sda"), machine.root)
    answers = {write.BLKGETSIZE64: size, write.BLKGETDISKSEQ: sequence}
    facts = types.SimpleNamespace(st_rdev=os.makedev(device >> 8, device & 0xFF), st_mode=stat.S_IFBLK)
    with pytest.raises(RefusedError, match=said) if said else contextlib.nullcontext(), monkeypatch.context() as patch:
        patch.setattr(write.os, "fstat", lambda handle: facts)
        patch.setattr(write.fcntl, "ioctl", lambda handle, request, room: answers[request].to_bytes(8, "little"))
        write._same_disk(99, disk)


def test_a_disk_whose_writing_fails_is_left_without_its_first_block(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it fails at the very last, with the partition table in place: a board would boot from what is not sound."""
    card(machine)
    disk, file = find_disk(Path("/dev/sda"), machine.root), tmp_path / "file"
    file.write_bytes(b"\xaa" * (3 << 20))
    monkeypatch.setattr(write, "_same_disk", lambda handle, disk: None)
    with pytest.raises(KeyboardInterrupt), opened(file, disk):
        raise KeyboardInterrupt
    assert file.read_bytes() == bytes(1 << 20) + b"\xaa" * (2 << 20)


def test_the_disks_of_this_very_machine_are_all_refused_or_named() -> None:
    """The real /sys is read, no device is opened: nothing on the machine that tests run on may ever pass."""
    for path in sorted(Path("/sys/class/block").glob("*"))[:40] if os.path.isdir("/sys/class/block") else []:
        disk = find_disk(Path("/dev") / path.name)
        if not disk.removable or disk.mounts:
            with pytest.raises(BmoeError):
                check_disk(disk, 1)
