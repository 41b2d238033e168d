"""Programs of this machine that emulation runs: each to its end, within a time, its last words in the error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from bmoe.protocol.errors import UnavailableError


def run_tool(what: str, command: Sequence[str], within_s: float, cwd: Path | None = None) -> str:
    """What a program wrote to its standard output. Raises UnavailableError, which begins with `what`."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=within_s, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{what} did not end within {within_s:g} s") from None
    except OSError as error:
        raise UnavailableError(f"{what} cannot be started: {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise UnavailableError(f"{what} failed (status {done.returncode}): {last_words(done.stderr or done.stdout)}")
    return done.stdout


def last_words(text: str) -> str:
    """The last lines of a program that say something, as one line."""
    lines = list(_telling(text))
    return " / ".join(lines[-3:]) or "it said nothing"


def _telling(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip() and not line.startswith(("N: ", "Reading ", "Building ", "Get:", "Hit:")):
            yield line.strip()
