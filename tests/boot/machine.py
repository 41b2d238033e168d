"""A whole emulated board: QEMU's machine `virt` with an image as its card, its console in a log, and a door for commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from host_tools import HostTools

from coordinator.embedded import launch

HOST = "10.0.2.2"  # where QEMU's own network has the machine that it runs on, its loopback services included
UP_WITHIN_S = 600.0
COMMAND_WITHIN_S = 120.0


class Machine:
    """One board. `start` is power on, `cut` is the plug pulled: nothing is told to the guest or flushed for it."""

    def __init__(self, image: Path, kernel: Path, initrd: Path, folder: Path, *, cpu: str, memory_mb: int) -> None:
        self._tools, self.folder = HostTools(), folder
        self.console, self._door = folder / "console.log", folder / "door"
        data = self._tools.data("qemu")
        self._command = [
            self._tools.path("qemu-system-aarch64"), *(["-L", data] if data else []),
            "-M", "virt", "-cpu", cpu, "-smp", "2", "-m", str(memory_mb), "-accel", "tcg,thread=multi",
            "-nographic", "-nodefaults", "-no-reboot", "-monitor", "none",
            "-kernel", str(kernel), "-initrd", str(initrd),
            "-append", "console=ttyAMA0 root=/dev/vda2 rw panic=-1 net.ifnames=1 systemd.show_status=1",
            "-serial", f"file:{self.console}",
            "-drive", f"if=none,file={image},format=raw,id=card,cache=none",
            "-device", "virtio-blk-pci,drive=card,romfile=",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci,romfile=",
            "-device", "virtio-serial-pci,romfile=",
            "-chardev", f"socket,id=door,path={self._door},server=on,wait=off",
            "-device", "virtserialport,chardev=door,name=test.probe",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: socket.socket | None = None
        self._read = b""

    def start(self) -> None:
        """Power on; returns at once."""
        self._door.unlink(missing_ok=True)
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._tools.environment(), start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Pull the plug."""
        assert self._process is not None
        self._process.kill()
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
        assert self._process.poll() is None, f"QEMU has ended: {(self.folder / 'qemu.log').read_text()}"
        assert time.monotonic() - started < within_s, f"the guest did not come up\n{self.tail()}"

    def tail(self) -> str:
        """The last words of the console."""
        try:
            return self.console.read_bytes()[-3000:].decode(errors="replace")
        except OSError:
            return ""
