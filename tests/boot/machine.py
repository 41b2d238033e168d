"""A whole emulated board: QEMU's machine `virt` with an image as its card, its console in a log, and a door for commands.

QEMU is the firmware: it hands the kernel the command line that it is given, and ends where the guest would start anew.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from host_tools import HostTools

from coordinator.boards import Board
from coordinator.embedded import launch

HOST = "10.0.2.2"  # where QEMU's own network has the machine that it runs on, its loopback services included
UP_WITHIN_S = 600.0
COMMAND_WITHIN_S = 120.0
LINE = "console=ttyAMA0 root=/dev/vda2 rw panic=-1 net.ifnames=1 systemd.show_status=1"
# It counts and never bites: this machine may be too busy for a guest that is well.
WATCHDOG = ("-device", "i6300esb", "-action", "watchdog=none")


class Machine:
    """One board. `start` is power on, `cut` is the plug pulled: nothing is told to the guest or flushed for it.

    `images` holds kernel and initrd; `line` gives the kernel's command line at each power on. A board whose profile has a
    watchdog gets one.
    """

    def __init__(self, card: Path, images: Path, folder: Path, profile: Board, line: Callable[[], str] = lambda: LINE):
        self._tools, self.folder, self._line_of = HostTools(), folder, line
        self.console, self._door = folder / "console.log", folder / "door"
        data = self._tools.data("qemu")
        self._command = [
            self._tools.path("qemu-system-aarch64"), *(["-L", data] if data else []),
            "-M", "virt", "-cpu", profile.cpu, "-smp", "2", "-m", str(profile.memory_mb), "-accel", "tcg,thread=multi",
            "-nographic", "-nodefaults", "-no-reboot", "-monitor", "none",
            "-kernel", str(images / "vmlinuz"), "-initrd", str(images / "initrd"),
            "-serial", f"file:{self.console}",
            "-drive", f"if=none,file={card},format=raw,id=card,cache=none",
            "-device", "virtio-blk-pci,drive=card,romfile=",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci,romfile=",
            "-device", "virtio-serial-pci,romfile=",
            "-chardev", f"socket,id=door,path={self._door},server=on,wait=off",
            "-device", "virtserialport,chardev=door,name=test.probe",
            *(WATCHDOG if profile.watchdog.device else ()),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: socket.socket | None = None
        self._read = b""

    def start(self) -> None:
        """Power on; returns at once."""
        self._door.unlink(missing_ok=True)
        self.console.unlink(missing_ok=True)
        command = [*self._command, "-append", self._line_of()]
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._tools.environment(), start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Pull the plug."""
        assert self._process is not None
        self._process.kill()
        self._over()

    def restarts(self, within_s: float) -> float:
        """Wait until the guest restarts by itself, which ends QEMU here; seconds since the call."""
        assert self._process is not None
        started = time.monotonic()
        try:
            status = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the guest did not restart within {within_s:g} s\n{self.tail()}") from None
        assert status == 0 and "reboot: Restarting system" in self.tail(), f"QEMU ended ({status})\n{self.tail()}"
        self._over()
        return time.monotonic() - started

    def says(self, text: str, within_s: float) -> float:
        """Wait for a text on the console; seconds since the call."""
        started = time.monotonic()
        while not (self.console.exists() and text in self.console.read_text(errors="replace")):
            self._still_runs(started, within_s)
            time.sleep(0.1)
        return time.monotonic() - started

    def _over(self) -> None:
        assert self._process is not None
        self._process.wait()
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def up(self, within_s: float = UP_WITHIN_S) -> float:
        """Wait until the guest takes commands; seconds since the call."""
        started = time.monotonic()
        while self._wire is None:
            self._still_runs(started, within_s)
            wire = socket.socket(socket.AF_UNIX)
            try:
                wire.connect(str(self._door))
                self._wire = wire
            except OSError:
                wire.close()
                time.sleep(0.2)
        self._wire.settimeout(within_s)
        assert self._line() == {"up": True}
        return time.monotonic() - started

    def run(self, command: str, within_s: float = COMMAND_WITHIN_S) -> tuple[int, str]:
        """Run a shell command as root in the guest: its status and all it said."""
        assert self._wire is not None
        self._wire.settimeout(within_s)
        self._wire.sendall(json.dumps({"run": command}).encode() + b"\n")
        reply = self._line()
        return reply["status"], reply["said"]

    def check(self, command: str, within_s: float = COMMAND_WITHIN_S) -> str:
        """As `run`, for a command that must succeed."""
        status, said = self.run(command, within_s)
        assert status == 0, f"{command}: {said}"
        return said

    def _line(self) -> dict:  # type: ignore[type-arg]
        assert self._wire is not None
        while b"\n" not in self._read:
            try:
                piece = self._wire.recv(65536)
            except TimeoutError:
                raise AssertionError(f"the guest says nothing\n{self.tail()}") from None
            assert piece, f"QEMU has ended\n{self.tail()}"
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _still_runs(self, started: float, within_s: float) -> None:
        assert self._process is not None
        assert self._process.poll() is None, f"QEMU has ended\n{self.tail()}"
        assert time.monotonic() - started < within_s, f"not within {within_s:g} s\n{self.tail()}"

    def tail(self) -> str:
        """The last words of QEMU and of the console."""
        logs = [path.read_bytes()[-3000:] for path in (self.folder / "qemu.log", self.console) if path.exists()]
        return b"\n".join(logs).decode(errors="replace")
