"""A card written to a file, and what anybody who trusts nobody can say of it afterwards."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from image_maker import tool

from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.join_token import JoinToken
from coordinator.boards import load_board
from coordinator.cli import commands
from coordinator.flash import flash as flashing
from coordinator.flash.flash import Desk, Wishes, flash

NOW_S = 1_790_000_000
TOKEN = JoinToken("https://192.0.2.7:8443", b"token-id", b"secret-of-16-byt", bytes(range(32)))


def away(token: JoinToken, name: str) -> Any:
    """A gateway that nobody can reach from here."""
    raise UnavailableError("https://192.0.2.7:8443 does not answer: no route to host")


def flashed(
    monkeypatch: pytest.MonkeyPatch, image: Path | None, output: Path, ask: Any = away, **wishes: Any
) -> tuple[list[str], dict[str, Any]]:
    """Flash to a file, with the gateway away if `ask` gives no other answer; what was said, and the facts."""
    monkeypatch.setattr(flashing, "ask", ask)
    said: list[str] = []
    desk = Desk(said.append, lambda phase: lambda done, total: None, None, clock=lambda: NOW_S)
    given: dict[str, Any] = {
        "board": load_board("rpi5"), "image": image, "device": None, "output": output, "token": TOKEN.text(),
    }  # fmt: skip
    flash(Wishes(**{**given, **wishes}), desk)
    return said, desk.facts


@functools.cache
def _command() -> Any:
    """The command line, built once: typer builds it anew for each call."""
    return typer.main.get_command(commands.app)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """Run `bmoe flash`; exit status, and the one line of the error."""
    monkeypatch.setattr(sys, "argv", ["bmoe", "flash", *map(str, words)])
    monkeypatch.setattr(commands, "app", _command())
    monkeypatch.setattr(flashing, "ask", away)
    status = commands.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bmoe: ")]
    assert len(lines) == 1, lines
    return status, lines[0]


def check_fat(part: Path) -> None:
    """By the checker of dosfstools, where it is."""
    fsck = tool("fsck.fat") or tool("fsck.vfat")
    if fsck is not None:
        done = subprocess.run([fsck, "-n", str(part)], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout


def check_ext4(part: Path) -> None:
    """By e2fsck, where it is."""
    fsck = tool("e2fsck")
    if fsck is not None:
        done = subprocess.run([fsck, "-fn", str(part)], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout


def check_table(image: Path) -> None:
    """By sfdisk, where it is."""
    sfdisk = tool("sfdisk")
    if sfdisk is not None:
        done = subprocess.run([sfdisk, "-V", str(image)], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
