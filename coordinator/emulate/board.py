"""One emulated board: a thin folder beside the shared root, with the board's identity and its `python`.

QEMU's -L takes one prefix, where it looks for every absolute path first: links lead from it into the shared root, and
its /proc and /sys hold what the profile says. `python` is a script of this machine that starts the aarch64 Python
under QEMU and names itself as the interpreter, so that what a board starts as its own Python is emulated too: no
chroot, no binfmt, no root, nothing in the agent that knows of it.
"""

from __future__ import annotations

import compileall
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmoe.inference.runner import PACKAGE_ROOT
from bmoe.protocol.errors import ConfigError
from coordinator.boards import Board, load_board
from coordinator.emulate.compute import Arrays, compute
from coordinator.emulate.identity import identity_files
from coordinator.emulate.sysroot import Sysroot

OURS = ("bmoe", "edge_agent")
LINKS = ("bin", "lib", "sbin", "usr")
# Settings of this machine's own programs; those for its processor would be wrong for another.
NOT_HANDED_ON = (
    "LD_LIBRARY_PATH", "LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE",
    "PYTHONPLATLIBDIR", "PYTHONSTARTUP", "PYTHONUSERBASE",
)  # fmt: skip


@dataclass(frozen=True)
class EmulatedBoard:
    """A board that can run Python programs: `python` takes the arguments of Python."""

    profile: Board
    folder: Path

    @property
    def name(self) -> str:
        """The profile's name."""
        return self.profile.name

    @property
    def python(self) -> Path:
        """The script that is this board's Python."""
        return self.folder / "python"

    @property
    def agent(self) -> tuple[str, ...]:
        """The command `bmoe-agent` of this board."""
        return (str(self.python), "-c", "import sys; from edge_agent.cli import main; sys.exit(main())")

    def run(self, file: Path, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run an ONNX file as this board's agent would; its outputs by name. Raises ModelError, InferenceError, ..."""
        return compute(str(self.python), [(Path(file), inputs)])[0]


def emulated_profile(name: str) -> Board:
    """The profile of that name. Raises UnknownError where there is none, ConfigError for a board that QEMU cannot be."""
    profile = load_board(name)
    if profile.arch != "aarch64" or not profile.cpu:
        raise ConfigError(f"{profile.name} cannot be emulated: its profile names no aarch64 processor of QEMU")
    return profile


def lay_out(profile: Board, shared: Sysroot, folder: Path, *, code: Path) -> EmulatedBoard:
    """Make the board's folder; it imports us from `code`."""
    prefix = folder / "prefix"
    prefix.mkdir(parents=True)
    for name in LINKS:
        (prefix / name).symlink_to(shared.root / name)
    for name, data in identity_files(profile).items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    board = EmulatedBoard(profile, folder)
    board.python.write_text(_script(board, shared, prefix, code))
    board.python.chmod(0o755)
    return board


def copy_agent(folder: Path, shared: Sysroot) -> Path:
    """Our own packages as a board has them, without the gateway's; taken from where this program runs."""
    for name in OURS:
        shutil.copytree(PACKAGE_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    if ".".join(map(str, sys.version_info[:2])) == shared.python:
        compileall.compile_dir(folder, quiet=2)  # under emulation it takes fifty times as long
    return folder


def _script(board: EmulatedBoard, shared: Sysroot, prefix: Path, code: Path) -> str:
    program = shared.root / "usr" / "bin" / f"python{shared.python}"
    paths = os.pathsep.join(dict.fromkeys([str(code), str(shared.site)]))
    q = shlex.quote
    return (
        "#!/bin/sh\n"
        f"# The Python of an emulated {board.profile.title}.\n"
        f"unset {' '.join(NOT_HANDED_ON)}\n"
        # This user's own packages are for this machine, though their folder is named for the same Python.
        f"export PYTHONHOME={q(str(shared.root / 'usr'))} PYTHONPATH={q(paths)} PYTHONNOUSERSITE=1\n"
        f"exec {q(str(shared.qemu))} -cpu {q(board.profile.cpu)} -L {q(str(prefix))} -0 {q(str(board.python))} "
        f'{q(str(program))} "$@"\n'
    )
