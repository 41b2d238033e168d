"""The shared root of all emulated boards: QEMU, an aarch64 Python, and the agent's aarch64 wheels, in a cache.

Fetched and unpacked natively, so that nothing of it runs under emulation but one import at the end, which proves it.
Made once for a recipe, beside, and renamed into place: a half-made one is never seen, and two makers wait in line.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError
from coordinator.emulate import apt

FORMAT = 1
CACHE = "BMOE_EMULATE_CACHE"
PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 17)), "manylinux2014_aarch64")
DEBS = ("python{0}-minimal", "libpython{0}-stdlib", "libstdc++6")
PIP_WITHIN_S = 900.0
PROOF_WITHIN_S = 120.0
PROOF = "import cbor2, cryptography.x509, numpy, onnxruntime, paho.mqtt.client, pydantic_settings, sqlite3, ssl"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Suite:
    """What a Debian release brings: its Python, and the package and file of QEMU's user emulation."""

    python: str
    qemu_package: str
    qemu_file: str


SUITES = {
    "bookworm": Suite("3.11", "qemu-user-static", "./usr/bin/qemu-aarch64-static"),
    "trixie": Suite("3.13", "qemu-user", "./usr/bin/qemu-aarch64"),
}


@dataclass(frozen=True)
class Sysroot:
    """A finished root. `python`: its Python's version, as 3.11."""

    folder: Path
    python: str

    @property
    def root(self) -> Path:
        """The unpacked Debian packages."""
        return self.folder / "root"

    @property
    def site(self) -> Path:
        """The unpacked wheels."""
        return self.folder / "site"

    @property
    def qemu(self) -> Path:
        """QEMU's program, which runs on this machine."""
        return self.folder / "qemu-aarch64"


@dataclass(frozen=True)
class Recipe:
    """All that decides what a root holds, but the days on which packages are renewed."""

    release: str
    suite: Suite
    requirements: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The root's name in the cache."""
        said = json.dumps([FORMAT, self.release, vars(self.suite), PLATFORMS, DEBS, self.requirements])
        return f"root-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def recipe() -> Recipe:
    """The recipe of this machine. Raises ConfigError where it has none."""
    release = apt.codename(apt.OS_RELEASE.read_text() if apt.OS_RELEASE.exists() else "")
    if release not in SUITES:
        raise ConfigError(f"emulation knows the packages of Debian {' and '.join(SUITES)}, not of {release}")
    try:
        declared = requires("bmoe") or []
    except PackageNotFoundError:
        raise ConfigError("bmoe itself is not installed here, so what its agent needs is not known") from None
    return Recipe(release, SUITES[release], agent_requirements(declared))


def agent_requirements(declared: list[str]) -> tuple[str, ...]:
    """What an agent needs beside us: the base requirements and those of the extra `agent`, for the Pythons above 3.10."""
    found = []
    for line in declared:
        name, _, marker = (part.strip() for part in line.partition(";"))
        if marker in ("", 'extra == "agent"', "extra == 'agent'"):
            found.append(name)
    return tuple(sorted(found))


def cache_folder() -> Path:
    """Where roots are kept: BMOE_EMULATE_CACHE, or ~/.cache/bmoe/emulate."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bmoe" / "emulate"


def sysroot(say: Say = lambda line: None) -> Sysroot:
    """The root of this machine's recipe, made if it is not there. Raises ConfigError, UnavailableError."""
    wanted, cache = recipe(), cache_folder()
    folder = cache / wanted.folder
    if folder.is_dir():
        return Sysroot(folder, wanted.suite.python)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / "lock", say):
            if not folder.is_dir():
                _make(wanted, folder, say)
    except OSError as error:
        raise UnavailableError(f"the cache {cache} cannot be written: {error.strerror}") from error
    return Sysroot(folder, wanted.suite.python)


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """Hold the cache; the kernel frees it at any death."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another process is making the root of emulated boards: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in path.parent.glob(".making-*"):  # whoever made them is dead, or held the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _make(wanted: Recipe, folder: Path, say: Say) -> None:
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    started = time.monotonic()
    try:
        made = Sysroot(making, wanted.suite.python)
        for step, what in (
            (_fetch_debian, "packages of Debian unpacked"),
            (_fetch_wheels, "aarch64 wheels unpacked"),
            (_compile, "bytecode compiled"),
            (_prove, "the emulated Python imports them all"),
        ):
            step(wanted, made)
            say(f"root of emulated boards: {what} ({time.monotonic() - started:.0f} s)")
        os.rename(making, folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _fetch_debian(wanted: Recipe, made: Sysroot) -> None:
    private = made.folder / "apt"
    sources = apt.machine_sources(wanted.release)
    host = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    if host is None:
        raise ConfigError(f"emulation runs on x86_64 and aarch64, this machine is {platform.machine()}")
    archive = apt.Archive(private, sources, tuple(dict.fromkeys(("arm64", host))))
    archive.update()
    package = archive.fetch_one(f"{wanted.suite.qemu_package}:{host}", private / "host")
    os.rename(apt.unpack_file(package, wanted.suite.qemu_file, private / "host"), made.qemu)
    apt.unpack(archive.fetch([name.format(wanted.suite.python) for name in DEBS]), made.root)
    shutil.rmtree(private)


def _fetch_wheels(wanted: Recipe, made: Sysroot) -> None:
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", wanted.suite.python,
        *(word for name in PLATFORMS for word in ("--platform", name)), "--target", str(made.site), *wanted.requirements,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"pip did not fetch the aarch64 wheels within {PIP_WITHIN_S:g} s") from None
    if done.returncode != 0:
        raise UnavailableError(f"pip cannot fetch the aarch64 wheels: {apt.last_words(done.stderr)}")
    for tests in [path for path in made.site.rglob("tests") if path.is_dir()]:
        shutil.rmtree(tests)  # thousands of files that no board has a use for


def _compile(wanted: Recipe, made: Sysroot) -> None:
    """By this machine's Python of the same version, where it has one; else the proof's run writes what it uses."""
    found = shutil.which(f"python{wanted.suite.python}")
    own = ".".join(map(str, sys.version_info[:2]))
    program = sys.executable if own == wanted.suite.python else found
    if program is not None:
        folders = (made.site, made.root / "usr" / "lib" / f"python{wanted.suite.python}")
        # Some files are of no version that compiles; what is missing in the end is compiled when it is imported.
        subprocess.run(
            [
                program, "-I", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash",
                "-s", str(made.folder), "-p", str(made.folder.with_name(wanted.folder)), *map(str, folders),
            ],
            capture_output=True, check=False,
        )  # fmt: skip


def _prove(wanted: Recipe, made: Sysroot) -> None:
    from coordinator.boards import load_board
    from coordinator.emulate.board import lay_out

    board = lay_out(load_board("rpi4"), made, made.folder / "proof", code=made.site)
    try:
        done = subprocess.run(
            [str(board.python), "-c", PROOF], capture_output=True, text=True, timeout=PROOF_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the emulated Python did not start within {PROOF_WITHIN_S:g} s") from None
    if done.returncode != 0:
        raise UnavailableError(
            f"the emulated Python does not run (status {done.returncode}): {apt.last_words(done.stderr)}"
        )
    shutil.rmtree(board.folder)
