"""Emulated boards without emulation: where packages come from, what a board tells of itself, what counts as drift."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bmoe.protocol.errors import ConfigError
from coordinator.boards import boards, load_board
from coordinator.emulate import apt
from coordinator.emulate.apt import Source, codename, deb822_sources, machine_sources, one_line_sources
from coordinator.emulate.board import copy_agent, lay_out
from coordinator.emulate.cache import CACHE, kept
from coordinator.emulate.drift import compare
from coordinator.emulate.identity import identity_files
from coordinator.emulate.sysroot import Sysroot, agent_requirements, recipe, sysroot

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""# a comment
Types: deb deb-src
URIs: http://one.test/debian http://two.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
# another
Signed-By: {KEYS}

Types: deb-src
URIs: http://source.test/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://inline.test/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xsBN
"""


def test_sources_are_read_as_apt_writes_them_today() -> None:
    found = deb822_sources(DEB822)
    both = [
        Source(f"http://{n}.test/debian", s, KEYS) for n in ("one", "two") for s in ("bookworm", "bookworm-updates")
    ]
    assert found == [*both, Source("http://inline.test/debian", "bookworm", "")]
    assert both[0].line(("arm64", "amd64")) == (
        f"deb [arch=arm64,amd64 signed-by={KEYS}] http://one.test/debian bookworm main"
    )


def test_sources_are_read_as_apt_wrote_them_once() -> None:
    text = (
        f"deb [arch=amd64 signed-by={KEYS}] http://a.test/debian bookworm main contrib # why\n"
        "deb-src http://a.test/debian bookworm main\n#deb http://b.test/debian bookworm main\n"
        "deb http://c.test/debian bookworm contrib\ndeb http://d.test/debian bookworm main\n\n"
    )
    assert one_line_sources(text) == [
        Source("http://a.test/debian", "bookworm", KEYS),
        Source("http://d.test/debian", "bookworm", ""),
    ]


def test_only_sources_of_this_release_count(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list").write_text("deb http://other.test/tools nodistro main\n")
    assert {source.suite for source in machine_sources("bookworm", tmp_path)} == {"bookworm", "bookworm-updates"}
    with pytest.raises(ConfigError, match="no source of Debian trixie main"):
        machine_sources("trixie", tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [('ID=ubuntu\nPRETTY_NAME="Ubuntu 24.04"\nVERSION_CODENAME=noble\n', "Ubuntu 24.04"), ("", "unnamed")],
)
def test_another_system_is_told_what_to_use(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"{found}.*use a Debian container"):
        codename(text)
    assert codename('ID=debian\nVERSION_CODENAME="bookworm"\n') == "bookworm"


def test_what_an_agent_needs_comes_from_our_own_metadata() -> None:
    declared = [
        "numpy>=1.26", 'onnxruntime!=1.21.0,>=1.20.1; extra == "agent"', 'typer>=0.15; extra == "gateway"',
        'tomli>=2; python_version < "3.11" and extra == "agent"',
    ]  # fmt: skip
    assert agent_requirements(declared) == ("numpy>=1.26", "onnxruntime!=1.21.0,>=1.20.1")


def test_without_apt_nothing_is_made_and_it_is_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(apt, "OS_RELEASE", tmp_path / "os-release")
    monkeypatch.setattr(apt, "SOURCES", tmp_path)
    (tmp_path / "os-release").write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    (tmp_path / "sources.list").write_text("deb http://a.test/debian bookworm main\n")
    with pytest.raises(ConfigError, match="emulation needs apt-get, dpkg-deb, tar"):
        sysroot()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_second_maker_waits_and_takes_what_the_first_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(apt, "OS_RELEASE", tmp_path / "os-release")
    (tmp_path / "os-release").write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    waits = threading.Event()
    made: list[Sysroot] = []
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: made.append(sysroot(lambda line: waits.set())))
        second.start()
        assert waits.wait(10)
        (tmp_path / recipe().folder).mkdir()
    second.join(10)
    assert made == [Sysroot(tmp_path / recipe().folder, "3.11")]


@pytest.mark.parametrize("name", [name for name in boards() if load_board(name).arch == "aarch64"])
def test_a_board_tells_what_its_profile_says(name: str) -> None:
    board = load_board(name)
    files = identity_files(board)
    cpuinfo = files["proc/cpuinfo"].decode()
    assert cpuinfo.count("processor\t:") == board.cpuinfo.cores
    assert f"CPU part\t: {board.cpuinfo.part}\n" in cpuinfo and " ".join(board.cpuinfo.features) in cpuinfo
    assert files["proc/device-tree/model"] == board.device_tree.model.encode() + b"\0"
    assert files["sys/devices/system/cpu/possible"] == f"0-{board.cpuinfo.cores - 1}\n".encode()
    assert f"MemTotal:       {board.memory_mb * 1024:>8} kB" in files["proc/meminfo"].decode()


def test_a_board_of_this_kind_of_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generic-x86-64 cannot be emulated"):
        lay_out(load_board("generic-x86-64"), Sysroot(tmp_path, "3.11"), tmp_path / "board", code=tmp_path)


def test_the_python_of_a_board_names_itself(tmp_path: Path) -> None:
    """What the agent starts as its own interpreter is the script again, paths with spaces and quotes or not."""
    shared = Sysroot(tmp_path / "it's a root", "3.11")
    board = lay_out(load_board("rpi3"), shared, tmp_path / "a board", code=tmp_path)
    shared.folder.mkdir()
    shared.qemu.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    shared.qemu.chmod(0o755)
    said = subprocess.run([board.python, "-c", "a b"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[said.index("-0") + 1] == str(board.python)
    assert said[:2] == ["-cpu", "cortex-a53"] and said[-2:] == ["-c", "a b"]


def test_a_board_gets_the_agent_and_nothing_of_the_gateway(tmp_path: Path) -> None:
    copy_agent(tmp_path / "code", Sysroot(tmp_path, "0.0"))
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["bmoe", "edge_agent"]
    assert (tmp_path / "code" / "bmoe" / "inference" / "worker.py").is_file()


def test_drift_is_what_differs() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    (same,) = compare({"y": x}, {"y": x.copy()})
    assert (same.equal, same.max_abs, same.argmax) == (True, 0.0, 1.0)
    (other,) = compare({"y": x}, {"y": x[:, ::-1].copy()})
    assert (other.equal, other.max_abs, other.argmax) == (False, 1.0, 0.0) and other.of_range == pytest.approx(1 / 3)
    for broken in (x[:1], x.astype(np.float64), np.full_like(x, np.nan)):
        (apart,) = compare({"y": x}, {"y": broken})
        assert not apart.equal and apart.max_abs == float("inf")


def test_the_plugin_costs_other_users_of_pytest_nothing() -> None:
    """Loaded into every run of an environment, it brings in no module of ours but itself."""
    probe = (
        "import json, pytest, sys; before = set(sys.modules); import coordinator.emulate.plugin;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["coordinator", "coordinator.emulate", "coordinator.emulate.plugin"]
