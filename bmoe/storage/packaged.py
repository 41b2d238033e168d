"""Where the built-in models and board files lie: in a checkout at its root, in an installed wheel under bmoe/_data."""

from __future__ import annotations

import re
from pathlib import Path

from bmoe.protocol.errors import ConfigError

KINDS = ("models", "firmware_configs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def packaged(kind: str, name: str) -> Path:
    """The folder `name` of `kind` ("models" or "firmware_configs"). Raises ConfigError, listing what there is."""
    root = _root()
    if kind not in KINDS or not _NAME.fullmatch(name):
        raise ConfigError(f"expected a plain name in {' or '.join(KINDS)}, got {kind!r}, {name!r}")
    folder = root / kind / name
    if not folder.is_dir():
        there = sorted(path.name for path in (root / kind).glob("*") if path.is_dir() and _NAME.fullmatch(path.name))
        raise ConfigError(f"{root / kind}: expected a folder {name!r}; there are: {', '.join(there) or 'none'}")
    return folder


def _root() -> Path:
    package = Path(__file__).resolve().parents[1]
    # The wheel's copy first: beside an installed package, `models` would be a stranger's top-level package.
    return package / "_data" if (package / "_data").is_dir() else package.parent
