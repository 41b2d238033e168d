"""The version mark of a state directory: what another version made is refused in one line, never guessed at."""

from __future__ import annotations

import json
from pathlib import Path

from bmoe import __version__
from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably

FILE = "format.json"


def check_format(state: Path, reads: int, made: Path, unmarked: int) -> None:
    """See that a state directory is of the format that this program reads, and mark a new one.

    `made` exists in every directory that is in use; one that has it and no mark is of format `unmarked`. Raises
    ConfigError for another format, with what to do.
    """
    path = state / FILE
    found, by = _read(path)
    if found is None and made.exists():
        found, by = unmarked, "an earlier version"
    if found is None:
        write_durably(path, json.dumps({"format": reads, "version": __version__}).encode() + b"\n")
    elif found != reads:
        older = found < reads
        remedy = (
            "go on with that version, or begin anew in another directory"
            if older
            else "install that version or a later one, and leave the directory as it is"
        )
        raise ConfigError(
            f"{state} was made by {'an older' if older else 'a newer'} bmoe ({by}, format {found}); "
            f"this is {__version__} and reads format {reads}: {remedy}"
        )
    elif not path.exists():
        write_durably(path, json.dumps({"format": reads, "version": __version__}).encode() + b"\n")


def _read(path: Path) -> tuple[int | None, str]:
    try:
        mark = json.loads(path.read_bytes())
        number, by = mark["format"], str(mark["version"])
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: restore it from a backup of the directory") from error
    if type(number) is not int or number < 0:
        raise ConfigError(f"{path} is damaged: format must be a number, found {number!r}")
    return number, by[:40]
