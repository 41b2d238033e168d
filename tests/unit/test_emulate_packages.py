"""What emulation fetches, without fetching: where packages come from, what is taken, and how the cache is filled."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bmoe.protocol.errors import ConfigError, UnavailableError
from coordinator.emulate import apt
from coordinator.emulate.apt import Source, codename, deb822_sources, machine_sources, one_line_sources
from coordinator.emulate.cache import CACHE, kept
from coordinator.emulate.sysroot import Sysroot, agent_requirements, recipe, sysroot

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""# a comment
Types: deb deb-src
URIs: http://one.test/debian http://two.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
# another
Signed-By: {KEYS}
 /more.gpg

Types: deb-src
URIs: http://source.test/debian
Suites: bookworm
Components: main

Types: deb
Enabled: False
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
        Source(f"http://{n}.test/debian", s, f"{KEYS},/more.gpg")
        for n in ("one", "two")
        for s in ("bookworm", "bookworm-updates")
    ]
    assert found == [*both, Source("http://inline.test/debian", "bookworm", "")]
    assert both[0].line(("arm64", "amd64")) == (
        f"deb [arch=arm64,amd64 signed-by={KEYS},/more.gpg] http://one.test/debian bookworm main"
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
    if os.geteuid() == 0:
        os.chown(tmp_path, 4712, -1)
        assert kept("root", lambda folder: None) == tmp_path / "root"  # a container's volume
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigError, match=r"belongs to uid \d+, who could run programs as you"):
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
