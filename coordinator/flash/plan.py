"""The plan of a card: what would be written where, and the files that differ. Made from an image and a seed; shown by
`--dry-run`, carried out by write.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ImageError
from coordinator.boards import Board
from coordinator.flash.fat import Fat, Readable
from coordinator.flash.first_boot import fat_stamp, files_for
from coordinator.flash.seed import Seed
from coordinator.flash.source import Source, expected_sha256, open_source
from coordinator.flash.spool import Spool
from coordinator.flash.survey import Progress, Survey, survey
from coordinator.flash.write import Patch

SECRETS = frozenset({"bmoe/token", "bmoe/wifi.nmconnection", "network-config"})
TEXT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Change:
    """One file of the boot partition. `before` is None where there is none yet."""

    path: str
    before: bytes | None
    after: bytes


@dataclass(frozen=True)
class Plan:
    """Everything that will be done to the target, besides the image itself."""

    survey: Survey
    changes: tuple[Change, ...]
    patches: tuple[Patch, ...]


def inspect(image: Path, board: Board, spool: Spool, sha256: str | None, progress: Progress) -> tuple[Source, Survey]:
    """Open an image and read it once; raises ConfigError, ImageError and LimitError, each before anything is written."""
    source = open_source(image)
    return source, survey(source, board, spool, expected_sha256(image, sha256), progress)


def make_plan(found: Survey, seed: Seed, image: Readable) -> Plan:
    """The plan for a surveyed image; raises ImageError, and LimitError where the boot partition has no room."""
    fat = Fat(image, found.boot.offset, found.boot.size)
    if fat.exists("bmoe"):  # with the keys of whoever made it, and of the device that it may have become
        raise ImageError("the image was made into a card before: take the system's image as its maker publishes it")
    existing: Callable[[str], bytes | None] = fat.read
    files = files_for(found.method, seed, found.label, existing)
    for wheel in seed.wheels:
        files[f"bmoe/wheels/{wheel.name}"] = wheel.read_bytes()
    changes = tuple(Change(path, fat.read(path), content) for path, content in sorted(files.items()))
    if found.relabel:
        fat.set_label(found.label, fat_stamp(seed.issued_s))
    for change in changes:
        fat.write(change.path, change.after, fat_stamp(seed.issued_s))
    for change in changes:  # what we read back is what the board will read
        if fat.read(change.path, limit=len(change.after)) != change.after:
            raise ImageError(f"{change.path} could not be put on the boot partition")
    return Plan(found, changes, tuple(fat.changes()))


def show_change(change: Change) -> list[str]:
    """A change as people read it: a unified diff; a secret's content and a wheel's are not shown."""
    if change.path in SECRETS:
        return [f"{_verb(change)} {change.path} ({len(change.after)} bytes, not shown: it is secret)"]
    if len(change.after) > TEXT_BYTES or b"\0" in change.after:
        return [f"{_verb(change)} {change.path} ({len(change.after)} bytes)"]
    before, after = ((data or b"").decode("utf-8", "replace").splitlines() for data in (change.before, change.after))
    body = list(difflib.unified_diff(before, after, f"a/{change.path}", f"b/{change.path}", lineterm=""))
    return [f"{_verb(change)} {change.path} ({len(change.after)} bytes)", *body]


def _verb(change: Change) -> str:
    if change.before is None:
        return "new    "
    return "same   " if change.before == change.after else "changed"
