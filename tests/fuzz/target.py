"""What a target of hostile bytes is: one decoder, honest inputs to spoil, and the one kind of error that it may raise."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mutate import Mutate, spoil

from bmoe.protocol.errors import BmoeError

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Target:
    """`read` decodes, and gives back the bytes that the value is spelled as, or None where no spelling is the only one.

    `errors` are all that `read` may raise; `memory` is how many bytes it may allocate at a time; `vary` spoils the
    values inside an honest input where a flipped bit would only break its outer form.
    """

    name: str
    read: Callable[[bytes], bytes | None]
    seeds: Callable[[], Sequence[bytes]]
    errors: tuple[type[BmoeError], ...]
    memory: int = 4 * MEGABYTE
    vary: Mutate | None = None

    @functools.cached_property
    def honest(self) -> tuple[bytes, ...]:
        """The honest inputs, made once."""
        return tuple(self.seeds())

    def hostile(self, number: int) -> bytes:
        """The spoiled input of a number; the same one every time."""
        random = Random(number)
        data = random.choice(self.honest)
        if self.vary is not None and random.random() < 0.6:
            return self.vary(random, data)
        return spoil(random, data, self.honest)

    def strike(self, data: bytes) -> bool:
        """Decode; True where it was taken. Whatever else comes out than the errors declared is the finding."""
        try:
            spelled = self.read(data)
        except self.errors as error:
            line = str(error)
            assert line, f"{self.name}: {type(error).__name__} says nothing"
            return False
        assert spelled is None or spelled == data, f"{self.name}: taken, and spelled otherwise: {spelled!r}"
        return True


@functools.cache
def scratch() -> Path:
    """A folder for decoders that read files, gone with the process."""
    holder = tempfile.TemporaryDirectory(prefix="bmoe-fuzz-")
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def in_file(name: str, data: bytes) -> Path:
    """The bytes as a file."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
