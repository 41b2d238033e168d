"""What a board has installed: one record a model, replaced in one step, which is the switch from a version to the next.

STATE/experts/SHA256.onnx and .release   experts that passed every check, shared by versions and models
STATE/updates/MODEL.json                 the version in use and the one before, each with its parts
STATE/updates/parts/SHA256               what has arrived of files that are not checked yet
STATE/updates/metadata/                  the repository's metadata last seen, so that it never goes back
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import BmoeError, ConfigError, RefusedError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name

FORMAT = 1


@dataclass(frozen=True)
class Version:
    """A version of a model on this board: SHA-256 of its manifest and of its parts, in hex."""

    version: int
    manifest: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """The version of a model in use, and the one before it, whose parts stay."""

    current: Version
    previous: Version | None = None


def experts_folder(state: Path) -> Path:
    """Where checked experts lie."""
    return state / "experts"


def updates_folder(state: Path) -> Path:
    """Where updates are prepared."""
    return state / "updates"


def read_record(state: Path, model: str) -> Record | None:
    """What is installed of a model; raises ConfigError for a record that cannot be read."""
    path = _path(state, model)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove it and the model is installed anew") from None
    try:
        if values["format"] != FORMAT:
            raise ConfigError(f"{path} has format {values['format']}, this version reads {FORMAT}")
        current, previous = (_version(values[key]) for key in ("current", "previous"))
        if current is None:
            raise TypeError
    except (LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}): remove it and the model is installed anew") from None
    return Record(current, previous)


def switch(state: Path, model: str, version: Version) -> Record:
    """Make a version the one in use, in one durable step; the one that was is kept as the one before."""
    known = read_record(state, model)
    if known is None:
        record = Record(version)
    elif known.current == version:
        return known
    else:
        record = Record(version, known.current)
    _write(state, model, record)
    return record


def pinned(state: Path) -> set[str]:
    """The parts, in hex, that no cache may drop: of every version in use, and of every one before."""
    found: set[str] = set()
    for path in updates_folder(state).glob("*.json"):
        try:
            record = read_record(state, path.stem)
        except BmoeError:  # a damaged record, or a file that is none
            continue
        versions = (record.current, record.previous) if record else ()
        found.update(part for version in versions if version for part in version.parts)
    return found


def _path(state: Path, model: str) -> Path:
    if not is_name(model):
        raise RefusedError(f"{model[:64]!r} is not the name of a model")
    return updates_folder(state) / f"{model}.json"


def _write(state: Path, model: str, record: Record) -> None:
    values = {"format": FORMAT, "model": model, **asdict(record)}
    write_durably(_path(state, model), (json.dumps(values, indent=1) + "\n").encode())


def _version(values: Any) -> Version | None:
    if values is None:
        return None
    version, manifest, parts = values["version"], values["manifest"], values["parts"]
    if type(version) is not int or type(manifest) is not str or not all(type(part) is str for part in parts):
        raise TypeError("a field of another type")
    return Version(version, manifest, tuple(parts))
