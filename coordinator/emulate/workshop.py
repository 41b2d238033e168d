"""Boards made on demand under one folder, all on the one shared root."""

from __future__ import annotations

from pathlib import Path

from coordinator.emulate.board import EmulatedBoard, copy_agent, emulated_profile, lay_out
from coordinator.emulate.cache import Say
from coordinator.emulate.sysroot import sysroot
from coordinator.emulate.tools import run_tool

VERSION_WITHIN_S = 30.0


class Workshop:
    """Makes each board once. The first may have to wait for the shared root: minutes, where its cache is empty."""

    def __init__(self, folder: Path, say: Say = lambda line: None) -> None:
        self.folder, self._say = folder.resolve(), say  # a board's programs run in other folders
        self._boards: dict[str, EmulatedBoard] = {}

    def board(self, name: str) -> EmulatedBoard:
        """The board of that profile. Raises UnknownError, ConfigError, UnavailableError."""
        if name not in self._boards:
            profile = emulated_profile(name)
            shared = sysroot(self._say)
            code = self.folder / "code"
            if not code.is_dir():
                copy_agent(code, shared)
            self._boards[name] = lay_out(profile, shared, self.folder / name, code=code)
        return self._boards[name]

    def qemu_version(self) -> str:
        """QEMU as it names itself."""
        return run_tool("QEMU", [str(sysroot(self._say).qemu), "--version"], VERSION_WITHIN_S).splitlines()[0]
