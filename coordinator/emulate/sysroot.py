"""The shared root of all emulated boards: QEMU, an aarch64 Python, and the agent's aarch64 wheels, in a cache.

Fetched and unpacked natively, so that nothing of it runs under emulation but one import at the end, which proves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from coordinator.emulate import apt
from coordinator.emulate.cache import Say, kept
from coordinator.emulate.tools import run_tool

FORMAT = 2
PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 17)), "manylinux2014_aarch64")
DEBS = ("python{0}-minimal", "libpython{0}-stdlib", "libstdc++6")
PIP_WITHIN_S = 900.0
PROOF_WITHIN_S = 300.0  # where no Python of its version has compiled it, it compiles under emulation
PROOF = "import cbor2, cryptography.x509, numpy, onnxruntime, paho.mqtt.client, pydantic_settings, sqlite3, ssl"
HOSTS = {"x86_64": "amd64", "aarch64": "arm64"}  # as the kernel and as Debian name them


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
    host: str

    @property
    def folder(self) -> str:
        """The root's name in the cache."""
        said = json.dumps([FORMAT, self.release, vars(self.suite), PLATFORMS, DEBS, self.requirements, self.host])
        return f"root-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def recipe() -> Recipe:
    """The recipe of this machine. Raises ConfigError where it has none."""
    release = apt.codename(apt.OS_RELEASE.read_text() if apt.OS_RELEASE.exists() else "")
    if release not in SUITES:
        raise ConfigError(f"emulation knows the packages of Debian {' and '.join(SUITES)}, not of {release}")
    host = HOSTS.get(platform.machine())
    if host is None:
        raise ConfigError(f"emulation runs on {' and '.join(HOSTS)}, this machine is {platform.machine()}")
    try:
        declared = requires("bmoe") or []
    except PackageNotFoundError:
        raise ConfigError("bmoe itself is not installed here, so what its agent needs is not known") from None
    return Recipe(release, SUITES[release], agent_requirements(declared), host)


def agent_requirements(declared: list[str]) -> tuple[str, ...]:
    """What an agent needs beside us: the base requirements and those of the extra `agent`, for the Pythons above 3.10."""
    found = []
    for line in declared:
        name, _, marker = (part.strip() for part in line.partition(";"))
        if marker in ("", 'extra == "agent"', "extra == 'agent'"):
            found.append(name)
    return tuple(sorted(found))


def foreign_wheels(python: str) -> list[str]:
    """pip's options for the wheels of a board with that Python, as "3.11", and nothing else."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def sysroot(say: Say = lambda line: None) -> Sysroot:
    """The root of this machine's recipe, made if it is not there. Raises ConfigError, UnavailableError."""
    wanted = recipe()
    return Sysroot(kept(wanted.folder, partial(_make, wanted, say), say), wanted.suite.python)


def _make(wanted: Recipe, say: Say, making: Path) -> None:
    started = time.monotonic()
    made = Sysroot(making, wanted.suite.python)
    for step, what in (
        (_fetch_debian, "packages of Debian unpacked"),
        (_fetch_wheels, "aarch64 wheels unpacked"),
        (_compile, "bytecode compiled"),
        (_prove, "the emulated Python imports them all"),
    ):
        step(wanted, made)
        say(f"root of emulated boards: {what} ({time.monotonic() - started:.0f} s)")


def _fetch_debian(wanted: Recipe, made: Sysroot) -> None:
    private = made.folder / "apt"
    sources = apt.machine_sources(wanted.release)
    archive = apt.Archive(private, sources, tuple(dict.fromkeys(("arm64", wanted.host))))
    archive.update()
    package = archive.fetch_one(f"{wanted.suite.qemu_package}:{wanted.host}", private / "host")
    os.rename(apt.unpack_file(package, wanted.suite.qemu_file, private / "host"), made.qemu)
    apt.unpack(archive.fetch([name.format(wanted.suite.python) for name in DEBS]), made.root)
    shutil.rmtree(private)


def _fetch_wheels(wanted: Recipe, made: Sysroot) -> None:
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        *foreign_wheels(wanted.suite.python), "--target", str(made.site), *wanted.requirements,
    ]  # fmt: skip
    run_tool("pip, which fetches the aarch64 wheels,", command, PIP_WITHIN_S)
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
    from coordinator.emulate.board import emulated_profile, lay_out

    board = lay_out(emulated_profile("rpi4"), made, made.folder / "proof", code=made.site)
    run_tool("the emulated Python", [str(board.python), "-c", PROOF], PROOF_WITHIN_S)
    shutil.rmtree(board.folder)
