"""Emulated boards without emulation: where packages come from, what a board tells of itself, what counts as drift."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bmoe.protocol.errors import ConfigError, UnavailableError
from bmoe.storage.packaged import packaged
from coordinator.boards import boards, load_board
from coordinator.cli.commands import run
from coordinator.emulate import apt
from coordinator.emulate.apt import Source, codename, deb822_sources, machine_sources, one_line_sources
from coordinator.emulate.board import copy_agent, emulated_profile, lay_out
from coordinator.emulate.cache import CACHE, kept
from coordinator.emulate.drift import compare
from coordinator.emulate.fleet import Fleet
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


def test_a_maker_that_dies_leaves_nothing_that_the_next_takes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle: no folder of that name, and what was begun is swept up by the next."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    half = (
        "import os, signal; from coordinator.emulate.cache import kept\n"
        "def make(folder):\n    (folder / 'first').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "kept('root', make)"
    )
    assert subprocess.run([sys.executable, "-c", half]).returncode == -9
    (begun,) = (tmp_path / "cache").glob(".making-*")
    assert (begun / "first").exists() and not (tmp_path / "cache" / "root").exists()
    folder = kept("root", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"] and not begun.exists()


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))

    def make(folder: Path) -> None:
        (folder / "first").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UnavailableError, match="cannot be used: No space left on device"):
        kept("root", make)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_cache_that_somebody_else_may_have_filled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs are run: whoever gets in there first, in a folder like /tmp, would run theirs as us."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    (tmp_path / "root").mkdir()
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by anybody"):
        kept("root", lambda folder: None)
    tmp_path.chmod(0o755)
    assert kept("root", lambda folder: None) == tmp_path / "root"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if tmp_path.stat().st_uid != 0:
        with pytest.raises(ConfigError, match="belongs to uid"):
            kept("root", lambda folder: None)


def test_a_root_is_of_one_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds that share a home, or a CI cache, do not take each other's QEMU."""
    monkeypatch.setattr(apt, "OS_RELEASE", Path(os.devnull))
    monkeypatch.setattr(apt, "codename", lambda text: "bookworm")
    names = []
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda m=machine: m)
        names.append(recipe().folder)
    assert len(set(names)) == 2
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="x86_64 and aarch64, this machine is riscv64"):
        recipe()


@pytest.fixture
def deb(tmp_path: Path) -> Callable[..., Path]:
    """Makes a package of files, or of links where a value is a path."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb makes the packages, and this system has none")

    def make(name: str, files: dict[str, str | Path]) -> Path:
        tree = tmp_path / f"tree-{name}"
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.test>\nDescription: x\n"
        for path, content in {"DEBIAN/control": control, **files}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                (tree / path).symlink_to(content)
            else:
                (tree / path).write_text(content)
        subprocess.run(
            ["dpkg-deb", "--build", "-Znone", tree, tmp_path / f"{name}.deb"], check=True, capture_output=True
        )
        return tmp_path / f"{name}.deb"

    return make


def test_packages_are_laid_out_in_their_root_alone(deb: Callable[..., Path], tmp_path: Path) -> None:
    """One package brings a link that leads out, the next a file behind it: nothing is written there."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    apt.unpack([deb("good", {"lib/a": "a", "usr/share/doc/good/b": "b"}), deb("link", {"usr/away": outside})], root)
    assert (root / "usr/lib/a").read_text() == "a" and not (root / "usr/share/doc").exists()
    with pytest.raises(UnavailableError, match=r"evil.deb would write into .*/outside"):
        apt.unpack([deb("evil", {"usr/away/c": "c"})], root)
    assert list(outside.iterdir()) == []


def test_a_damaged_package_and_one_without_the_file_are_refused(deb: Callable[..., Path], tmp_path: Path) -> None:
    good = deb("good", {"usr/bin/a": "a" * 100_000, "usr/bin/b": Path("a")})
    assert apt.unpack_file(good, "./usr/bin/a", tmp_path / "into").stat().st_size == 100_000
    for member in ("./usr/bin/b", "./usr/bin/c"):
        with pytest.raises(UnavailableError, match=r"good\.deb"):
            apt.unpack_file(good, member, tmp_path / "into")
    good.write_bytes(good.read_bytes()[:50_000])
    with pytest.raises(UnavailableError, match=r"good\.deb cannot be unpacked"):
        apt.unpack([good], tmp_path / "root")


def test_hooks_of_the_machines_apt_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have one that empties the system's own cache after each update."""
    if shutil.which("apt-get") is None:
        pytest.skip("there is no apt-get")
    hooks = tmp_path / "apt.conf"
    hooks.write_text(
        "".join(
            f'APT::Update::{when} {{"touch {tmp_path}/{when}";}};\n'
            for when in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
        )
    )
    monkeypatch.setenv("APT_CONFIG", str(hooks))
    apt.Archive(tmp_path / "private", [], ("arm64",)).update()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apt.conf", "private"]


def test_an_archive_that_nobody_signed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where this machine's own settings would let it pass with a warning."""
    if shutil.which("apt-get") is None:
        pytest.skip("there is no apt-get")
    suite = tmp_path / "mirror" / "dists" / "bookworm"
    (suite / "main" / "binary-arm64").mkdir(parents=True)
    (suite / "main" / "binary-arm64" / "Packages").touch()
    nothing = hashlib.sha256(b"").hexdigest()
    (suite / "Release").write_text(
        "Suite: bookworm\nCodename: bookworm\nArchitectures: arm64\nComponents: main\n"
        f"Date: Mon, 01 Jan 2024 00:00:00 UTC\nSHA256:\n {nothing} 0 main/binary-arm64/Packages\n"
    )
    (tmp_path / "apt.conf").write_text('Acquire::AllowInsecureRepositories "true";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    archive = apt.Archive(tmp_path / "private", [Source(f"file:{tmp_path}/mirror", "bookworm", "")], ("arm64",))
    with pytest.raises(UnavailableError, match="bookworm Release' is not signed"):
        archive.update()


def test_a_fleet_keeps_the_names_of_its_own_files(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.agents["pi"] = ()
    for name in ("gateway", "state", "models", "pi"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            fleet.add(name)
    with pytest.raises(ConfigError, match="is no folder"):
        fleet.publish(tmp_path / "none")


def test_what_cannot_be_tried_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that nothing may be put into stays untouched."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    model = packaged("models", "wearable")
    for words, said in (
        (["--board", "rpi4", "--board", "rpi9", "--model", str(model)], "there is no board 'rpi9'"),
        (["--board", "rpi4", "--model", str(tmp_path)], "model.json"),
        (["--board", "rpi4", "--model", str(model), "--keep", str(tmp_path)], "--keep wants a new folder"),
        (["--board", "rpi4", "--model", str(model), "--inputs", str(tmp_path / "none.npz")], "cannot be read"),
    ):
        monkeypatch.setattr(sys, "argv", ["bmoe", "emulate", *words])
        assert run() == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


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


def test_a_board_of_this_kind_of_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="generic-x86-64 cannot be emulated"):
        emulated_profile("generic-x86-64")


def test_the_python_of_a_board_names_itself(tmp_path: Path) -> None:
    """What the agent starts as its own interpreter is the script again, paths with spaces and quotes or not."""
    shared = Sysroot(tmp_path / "it's a root", "3.11")
    board = lay_out(load_board("rpi3"), shared, tmp_path / "a board", code=tmp_path)
    shared.folder.mkdir()
    shared.qemu.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" "$PYTHONNOUSERSITE$PYTHONUSERBASE"\n')
    shared.qemu.chmod(0o755)
    done = subprocess.run(
        [board.python, "-c", "a b"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONUSERBASE": "/packages/for/x86"},
    )  # fmt: skip
    *said, own_packages = done.stdout.splitlines()
    assert own_packages == "1"
    assert said[said.index("-0") + 1] == str(board.python)
    assert said[:2] == ["-cpu", "cortex-a53"] and said[-2:] == ["-c", "a b"]


def test_a_board_gets_the_agent_and_nothing_of_the_gateway(tmp_path: Path) -> None:
    copy_agent(tmp_path / "code", Sysroot(tmp_path, "0.0"))
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["bmoe", "edge_agent"]
    assert (tmp_path / "code" / "bmoe" / "inference" / "worker.py").is_file()


def test_whoever_interrupts_does_not_wait_for_the_board(tmp_path: Path) -> None:
    """Ctrl-C while an emulated board computes, which may take it minutes."""
    slow, began = tmp_path / "python", tmp_path / "began"
    slow.write_text(f"#!/bin/sh\necho $$ > {began}.half; mv {began}.half {began}\nexec sleep 600\n")
    slow.chmod(0o755)
    file = packaged("models", "wearable") / "gate.onnx"
    call = (
        "from pathlib import Path; from coordinator.emulate.compute import compute\n"
        f"compute({str(slow)!r}, [(Path({str(file)!r}), {{}})])"
    )
    with subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 20
        while not began.exists():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        try:
            assert "KeyboardInterrupt" in child.communicate(timeout=10)[1]
        finally:
            child.kill()
            os.kill(int(began.read_text()), signal.SIGKILL)


def test_drift_is_what_differs() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    (same,) = compare({"y": x}, {"y": x.copy()})
    assert (same.equal, same.max_abs, same.argmax) == (True, 0.0, 1.0)
    (other,) = compare({"y": x}, {"y": x[:, ::-1].copy()})
    assert (other.equal, other.max_abs, other.argmax) == (False, 1.0, 0.0) and other.of_range == pytest.approx(1 / 3)
    for broken in (x[:1], x.astype(np.float64), np.full_like(x, np.nan)):
        (apart,) = compare({"y": x}, {"y": broken})
        assert not apart.equal and apart.max_abs == apart.of_range == float("inf")
    (apart,) = compare({"y": np.full_like(x, np.nan)}, {"y": x})
    assert not apart.equal and apart.max_abs == apart.of_range == float("inf")
    (none,) = compare({"y": x[:0]}, {"y": x[:0]})
    assert (none.equal, none.argmax) == (True, 1.0)


def test_the_plugin_costs_other_users_of_pytest_nothing() -> None:
    """Loaded into every run of an environment, it brings in no module of ours but itself."""
    probe = (
        "import json, pytest, sys; before = set(sys.modules); import coordinator.emulate.plugin;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["coordinator", "coordinator.emulate", "coordinator.emulate.plugin"]
