"""What a card brings to be installed, and the script that installs it: by a real shell, with a Python that keeps a diary."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import runpy
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from io import BytesIO
from pathlib import Path

import pytest
from flash_helpers import flashed

from bmoe.protocol.errors import ConfigError
from bmoe.storage.packaged import packaged
from coordinator.boards import load_board
from coordinator.flash import own_wheel as making
from coordinator.flash.overlay import PLACE
from coordinator.flash.own_wheel import own_wheel

# `python3 -m venv` makes one more of itself; pip, where it does not fail, makes the agent's program.
PYTHON = """#!/bin/sh
echo "python $*" >> DIARY
case "$*" in
    *"-m venv"*) for place; do :; done; mkdir -p "$place/bin"; cp "$0" "$place/bin/python" ;;
    *pip*install*)
        case "$*" in *--no-index*) [ ! -e INDEX ] || exit 1 ;; *) [ ! -e OFFLINE ] || exit 1 ;; esac
        cp AGENT "$(dirname "$0")/bmoe-agent" ;;
esac
"""


class Board:
    """A board's file system, as far as install.sh sees it."""

    def __init__(self, root: Path) -> None:
        self.place, self.boot, self.diary = root / "opt/bmoe", root / "boot/bmoe", root / "diary"
        (self.boot / "wheels").mkdir(parents=True)
        (root / "programs").mkdir()
        (self.boot / "wheels/bmoe-0.1.0-py3-none-any.whl").touch()
        agent, python = root / "agent", root / "programs/python3"
        agent.write_text(f'#!/bin/sh\necho "agent $*" >> {self.diary}\n')
        words = {"DIARY": self.diary, "INDEX": root / "index", "OFFLINE": root / "offline", "AGENT": agent}
        python.write_text(re.sub("|".join(words), lambda match: str(words[match[0]]), PYTHON))
        for program in (agent, python):
            program.chmod(0o755)
        script = (packaged("firmware_configs", "first_boot") / "install.sh").read_text()
        script = script.replace("/opt/bmoe", str(self.place)).replace("/etc/systemd", f"{root}/etc/systemd")
        (self.boot / "install.sh").write_text(script.replace("@BOARD@", "rpi5"))
        self.needs_index, self.offline, self.root = root / "index", root / "offline", root

    def boots(self) -> tuple[int, list[str]]:
        """Run the script once: its exit status, and what was called in this run."""
        self.diary.write_text("")
        environment = {**os.environ, "PATH": f"{self.root / 'programs'}:{os.environ['PATH']}"}
        done = subprocess.run(["sh", str(self.boot / "install.sh")], env=environment, capture_output=True, timeout=20)
        return done.returncode, self.diary.read_text().splitlines()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_the_agent_comes_from_the_cards_own_wheel_and_what_it_needs_from_an_index(board: Board) -> None:
    """The name `bmoe` means nothing to an index: who took it there would be root on every board."""
    board.needs_index.touch()
    status, said = board.boots()
    pip = [line.split() for line in said if "pip install" in line]
    assert status == 0 and said[-1] == f"agent install --from {board.boot} --board rpi5"
    assert ["--no-index" in words for words in pip] == [True, False]
    for words in pip:
        assert words[-1] == f"{board.boot}/wheels/bmoe-0.1.0-py3-none-any.whl[agent]"
    assert not (board.place / "unfinished").exists()


def test_a_power_cut_in_the_middle_of_pip_is_begun_anew(board: Board) -> None:
    """What is there by name may have no content: pip would take it for installed, and the shell for a program that worked."""
    (board.place / "bin").mkdir(parents=True)
    (board.place / "bin/bmoe-agent").touch(mode=0o755)
    (board.place / "unfinished").touch()
    status, said = board.boots()
    assert status == 0 and any("-m venv" in line for line in said) and said[-1].startswith("agent install")
    assert board.boots()[1][-1].startswith("agent install"), "and a second time nothing is made anew"
    assert not any("venv" in line for line in board.boots()[1])


def test_without_network_it_fails_and_goes_on_from_there(board: Board) -> None:
    board.needs_index.touch()
    board.offline.touch()
    status, said = board.boots()
    assert status != 0 and not any(line.startswith("agent") for line in said)
    assert not (board.place / "unfinished").exists(), "pip took back what it began: nothing to do anew"
    board.offline.unlink()
    assert board.boots()[0] == 0


def test_every_shell_script_of_a_first_boot_is_one() -> None:
    for script in sorted(packaged("firmware_configs", "first_boot").glob("*.sh")):
        subprocess.run(["sh", "-n", str(script)], check=True, timeout=10)


def shipped() -> set[str]:
    """The data files of a wheel that setuptools builds."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    root = Path(__file__).resolve().parents[2]
    return set(runpy.run_path(str(root / "setup.py"))["shipped_files"](root))


def test_bmoes_own_wheel_is_whole_and_holds_what_an_agent_reads(tmp_path: Path) -> None:
    """As an installer checks it: every file with its digest in RECORD. `make test-boot` has pip install it on a board."""
    name, content = own_wheel()
    with zipfile.ZipFile(BytesIO(content)) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
        archive.extractall(tmp_path / "site")
    record = f"{name.removesuffix('-py3-none-any.whl')}.dist-info/RECORD"
    rows = dict(line.rsplit(",", 2)[:2] for line in files[record].decode().splitlines())
    for entry, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert rows.pop(entry) == ("" if entry == record else f"sha256={digest}")
    assert rows == {} and not [entry for entry in files if entry.endswith(".pyc")]
    assert {"edge_agent/install.py", "coordinator/cli/__init__.py", "bmoe/protocol/keys.py"} <= set(files)
    assert {entry[len("bmoe/_data/") :] for entry in files if entry.startswith("bmoe/_data/")} == shipped()
    code = "import bmoe, edge_agent.install as i; print(bmoe.__file__, i.profile('rpi5')['name'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "site/bmoe/__init__.py"), "rpi5"]


def test_a_card_brings_bmoe_even_if_no_wheels_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, facts = flashed(monkeypatch, None, tmp_path / "overlay", board=load_board("jetson-orin-nano"), dry_run=True)
    assert f"{PLACE}/bmoe/wheels/{own_wheel()[0]}" in facts["files"]
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "bmoe-9.9-py3-none-any.whl").write_bytes(b"the user's own")
    _, facts = flashed(
        monkeypatch, None, tmp_path / "o", board=load_board("jetson-orin-nano"), dry_run=True, wheels=wheels
    )
    assert not [path for path in facts["files"] if path.endswith(own_wheel()[0])]


def test_code_that_is_not_what_is_installed_makes_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making.bmoe, "__version__", "0.0.1")
    with pytest.raises(ConfigError, match="install it anew"):
        own_wheel.__wrapped__()


@pytest.mark.parametrize("name", ["PKG-INFO", "nothing"])
def test_metadata_of_a_checkout_that_comes_first_on_the_path_are_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`pip install -e .` leaves them in `bmoe.egg-info`; a wheel without metadata is one that no board can install."""
    folder = tmp_path / "bmoe.egg-info"
    folder.mkdir()
    (folder / name).write_text(f"Metadata-Version: 2.4\nName: bmoe\nVersion: {making.bmoe.__version__}\n")
    monkeypatch.setattr(making, "distribution", lambda _: PathDistribution(folder))
    if name == "nothing":
        monkeypatch.setattr(PathDistribution, "version", making.bmoe.__version__)
        with pytest.raises(ConfigError, match="no metadata"):
            own_wheel.__wrapped__()
        return
    wheel, content = own_wheel.__wrapped__()
    with zipfile.ZipFile(BytesIO(content)) as archive:
        info = archive.read(f"{wheel.removesuffix('-py3-none-any.whl')}.dist-info/METADATA")
    assert b"\nName: bmoe\n" in info
