"""Which version this agent is wanted to hold, and what became of it: two small files between the agent and its updater.

In `updates/rollout/`, wanted.json is written by the agent, from a coordinator's signed word, and result.json by the
updater, a process of its own that may die at any point: what is not in the result has not happened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.messages import INSTALL_STATES, Update
from bmoe.protocol.text import plain

FOLDER = "updates/rollout"


@dataclass(frozen=True)
class Wanted:
    """What a coordinator wants of us: a version by its parts' digests, and at which SuperLink a node is expected."""

    rollout: bytes
    model: str
    version: int
    digests: tuple[bytes, ...]
    carrier: str
    superlink: str


@dataclass(frozen=True)
class Result:
    """What became of a wanted version: `state` is installed, refused or failed."""

    rollout: bytes
    state: str
    reason: str = ""


def wanted_of(update: Update) -> Wanted:
    """What an update message says."""
    u = update
    return Wanted(u.rollout, u.model, u.version, tuple(u.digests), u.carrier, u.superlink)


def write_wanted(state: Path, wanted: Wanted) -> None:
    """Keep what is wanted, durably."""
    values = {**vars(wanted), "rollout": wanted.rollout.hex(), "digests": [d.hex() for d in wanted.digests]}
    write_durably(state / FOLDER / "wanted.json", json.dumps(values).encode(), mode=0o600)


def read_wanted(state: Path) -> Wanted | None:
    """What is wanted, None if nothing is; raises ConfigError for a damaged file."""
    values = _read(state / FOLDER / "wanted.json")
    if values is None:
        return None
    try:
        return Wanted(
            bytes.fromhex(values["rollout"]), str(values["model"]), int(values["version"]),
            tuple(bytes.fromhex(digest) for digest in values["digests"]), str(values["carrier"]),
            str(values["superlink"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{state / FOLDER / 'wanted.json'} is damaged ({error!r}): delete it") from None


def write_result(state: Path, result: Result) -> None:
    """Keep what became of it, durably."""
    values = {"rollout": result.rollout.hex(), "state": result.state, "reason": plain(result.reason, 300)}
    write_durably(state / FOLDER / "result.json", json.dumps(values).encode(), mode=0o600)


def read_result(state: Path, wanted: Wanted) -> Result | None:
    """What became of that very version, None while nothing has."""
    try:
        values = _read(state / FOLDER / "result.json")
        if values is None or values["rollout"] != wanted.rollout.hex() or values["state"] not in INSTALL_STATES:
            return None
        return Result(wanted.rollout, str(values["state"]), plain(str(values["reason"]), 300))
    except (ConfigError, KeyError, TypeError):  # a result that cannot be read: the updater makes it anew
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object: delete it")
    return values
