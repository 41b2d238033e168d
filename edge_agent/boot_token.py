"""Taking a join token from the boot partition, by root: into the agent's directory, and then out of everywhere else.

What a power cut finds: until the last step the token lies on the partition, so whatever was left undone is done by the next
call, at the next boot. Only when no copy is left is it destroyed there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.join_token import parse_token
from edge_agent import enrol
from edge_agent.config import SYSTEM_STATE
from edge_agent.handover import drop, put
from edge_agent.shred import blank, shred

BOOT_FOLDERS = ("boot/firmware/bmoe", "boot/bmoe")
# What other programs of a first boot may have copied a token into.
COPIES = ("boot/firmware/*", "boot/*", "var/lib/cloud/**/*", "run/cloud-init/**/*", "var/log/cloud-init*")
NAME_BYTES = 256


def take_token(root: Path, source: Path | None = None) -> Path | None:
    """Move a token into the state directory below `root`; returns where it was found, None if nowhere.

    `source` is a folder to look into first. What cannot be destroyed is told on standard error. Raises ConfigError for
    what is no token, OSError where the state directory cannot be written.
    """
    folders = [*([source] if source else []), *(within(root, root / folder) for folder in BOOT_FOLDERS)]
    found = next((folder for folder in folders if os.path.lexists(folder / "token")), None)
    if found is None:
        return None
    data = head(found / "token", enrol.TOKEN_BYTES)
    if not data.strip(b"\0\r\n "):  # overwritten already; the power went before its name was gone
        _destroyed(found / "token", shred)
        return None
    text = data.decode(errors="replace").strip()
    try:
        parse_token(text)
    except InputError as error:
        raise ConfigError(f"{found / 'token'}: {error}") from None
    _keep(made_state(root), text.encode(), found / "name")
    for pattern in COPIES:
        for path in root.glob(pattern):
            _destroyed(within(root, path), lambda copy: blank(copy, text.encode()))
    _destroyed(found / "token", shred)
    return found / "token"


def made_state(root: Path) -> Path:
    """The state directory below `root`, made where it is not there: for its owner alone. Raises ConfigError, OSError."""
    state = within(root, root / SYSTEM_STATE.relative_to("/"))
    os.makedirs(state, mode=0o700, exist_ok=True)
    return within(root, state / "any").parent


def within(root: Path, path: Path) -> Path:
    """`path` itself. Raises ConfigError where its folder is a link out of `root`, a tree that others may have made."""
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{path} leads out of {root}, by a link: nothing is written there")
    return path


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file; raises OSError."""
    with path.open("rb") as file:
        return file.read(size)


def _keep(state: Path, token: bytes, name: Path) -> None:
    """The name first: an agent that waits takes both as soon as there is a token."""
    if name.exists():
        put(state, "join/name", head(name, NAME_BYTES))
    else:
        drop(state, "join/name")  # that of an earlier token
    put(state, "join/token", token + b"\n")


def _destroyed(path: Path, destroy: Callable[[Path], None]) -> None:
    try:
        destroy(path)
    except OSError as error:
        print(f"bmoe-agent: the token may still be in {path}: {error.strerror or error}", file=sys.stderr)
