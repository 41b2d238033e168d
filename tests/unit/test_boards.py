"""Board profiles: those that come with bmoe are true to the schema, and each way to break one has one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bmoe.protocol.errors import ConfigError, UnknownError
from bmoe.storage.packaged import packaged
from coordinator.boards import MAX_BYTES, boards, check_board, load_board
from coordinator.cli.commands import app

ALL = {
    "rpi3", "rpi4", "rpi5", "rpi-zero-2w", "jetson-orin-nano", "jetson-orin-nx", "generic-aarch64", "generic-x86-64",
}  # fmt: skip
PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b"}  # cputype.h of Linux


def test_every_board_promised_has_a_profile_that_says_its_own_name() -> None:
    assert set(boards()) == ALL
    assert {load_board(name).name for name in boards()} == ALL


def test_a_raspberry_pi_is_emulated_by_the_processor_that_its_cpuinfo_names() -> None:
    for name in ("rpi3", "rpi4", "rpi5", "rpi-zero-2w"):
        board = load_board(name)
        assert board.cpuinfo.part == PARTS[board.cpu] and board.cpuinfo.implementer == "0x41"
        assert board.watchdog.max_s == 15 and len(board.cpuinfo.board_revision) == 6


def test_an_unknown_board_is_one_line_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownError, match=r"there is no board 'rpi9'; there are: generic-aarch64, .*rpi5"):
        load_board("rpi9")
    with pytest.raises(UnknownError):
        load_board("../boards/rpi5")


BROKEN = [
    ("no TOML", "name = [", r"expected TOML"),
    ("another's name", ('name = "rpi5"', 'name = "rpi4"'), r"name: expected 'rpi5' .*found 'rpi4'"),
    ("an unknown key", ('systemd = "cpu"', 'systemd = "cpu"\nturbo = true'), r"turbo: .*not permitted"),
    ("an unknown table", ("[python]", "[overclock]\nmhz = 3000\n[python]"), r"overclock: .*not permitted"),
    ("no architecture", ('arch = "aarch64"\n', ""), r"arch: Field required"),
    ("another architecture", ('"aarch64"', '"riscv64"'), r"arch: .*'aarch64' or 'x86_64' \(found 'riscv64'\)"),
    ("text for a number", ("cores = 4", 'cores = "four"'), r"cpuinfo\.cores: .*integer \(found 'four'\)"),
    ("no cores", ("cores = 4", "cores = 0"), r"cpuinfo\.cores: .*greater than or equal to 1"),
    ("a part that is no hexadecimal", ('"0xd0b"', '"A76"'), r"cpuinfo\.part: .*\(found 'A76'\)"),
    ("more threads than cores", ("threads = 3", "threads = 8"), r"agent\.threads is at most cpuinfo\.cores"),
    ("more memory than there is", ("memory_mb = 1024", "memory_mb = 2000"), r"at most half of memory_mb"),
    ("a watchdog beyond its hardware", ("timeout_s = 14", "timeout_s = 60"), r"watchdog\.timeout_s is at most"),
    ("no partition to put files on", ('boot_labels = ["bootfs", "system-boot"]\n', ""), r"names a partition"),
    ("an unknown way to boot", ('["firstrun", "cloud-init"]', '["ignition"]'), r"first_boot\.0: .*'ignition'"),
    ("a provider that is none", ('"CPUExecutionProvider"', '"Turbo"'), r"providers\.0: .*'Turbo'"),
    ("no provider to fall back to", ('"CPUExecutionProvider"', '"CUDAExecutionProvider"'), r"ends with the CPU"),
    ("a mount that is no path", ('"/boot/firmware"', '"boot"'), r"image\.boot_mount: .*'boot'"),
    ("a line break in what is shown", ("Pi 5 Model B", "Pi 5\\nModel B"), r"device_tree\.model: "),
]


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_profile_is_told_in_one_line_with_file_key_expected_and_found(
    change: str | tuple[str, str], said: str, tmp_path: Path
) -> None:
    good = (packaged("firmware_configs", "boards") / "rpi5.toml").read_text()
    assert isinstance(change, str) or change[0] in good
    file = tmp_path / "rpi5.toml"
    file.write_text(change if isinstance(change, str) else good.replace(*change))
    with pytest.raises(ConfigError, match=said) as told:
        check_board(file)
    line = str(told.value)
    assert line.startswith(f"{file}: ") and "\n" not in line and "pydantic" not in line
    done = CliRunner().invoke(app, ["boards", "check", str(file)])
    assert isinstance(done.exception, ConfigError) and str(done.exception) == line


def test_a_profile_that_is_absent_or_endless_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_board(tmp_path / "rpi5.toml")
    (tmp_path / "rpi5.toml").write_text("#" * (MAX_BYTES + 1))
    for endless in (tmp_path / "rpi5.toml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="at most"):
            check_board(endless)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_a_profile_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("profile") / "any.toml"
    file.write_bytes(data)
    with pytest.raises(ConfigError):
        check_board(file)


def test_the_command_lists_shows_and_checks() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["boards", "list"])
    assert listed.exit_code == 0 and all(name in listed.output for name in ("rpi5", "jetson-orin-nx"))
    shown = runner.invoke(app, ["boards", "show", "rpi4"])
    assert '"part": "0xd08"' in shown.output
    file = packaged("firmware_configs", "boards") / "rpi3.toml"
    assert "a valid profile" in runner.invoke(app, ["boards", "check", str(file)]).output
    assert tomllib.loads(file.read_text())["name"] == "rpi3"
