"""The result cache: identical inputs of one tenant, for models whose manifest allows it, are not computed twice.

What is kept is the verdicts, not their promise: a cached answer is an entry of its own on the ledger, with salts of its
own, and rests on verdicts that can still be challenged. Pure but for what it remembers; the time is an argument.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from bmoe.ledger.rules.combine import Choices
from bmoe.protocol.tensors import Tensor
from coordinator.jobs import Accepted, Request

# Half the time within which a verdict can be answered from and challenged (TASK_WINDOW_MS).
KEPT_S = 600.0
ENTRIES = 4096
BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Combined:
    """A request's choices, the verdicts that they name, and the combined value."""

    choices: Choices
    tasks: tuple[Accepted, ...]
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        held = sum(len(a.opening) + sum(len(t.data) for t in a.tensors) for a in self.tasks)
        return held + sum(len(t.data) for t in self.tensors)


def key_of(request: Request) -> bytes:
    """What must be alike for one answer to serve for another: tenant, model version, policy, and every input byte."""
    found = hashlib.sha256()
    statement = request.model.statement
    for part in (request.tenant.encode(), statement.manifest, request.policy.encode()):
        found.update(len(part).to_bytes(4, "big") + part)
    for tensor in request.tensors:
        head = f"{tensor.name} {tensor.dtype} {list(tensor.dims)}".encode()
        found.update(len(head).to_bytes(4, "big") + head)
        found.update(tensor.data)
    return found.digest()


class Cache:
    """The latest results by key, within bounds of age, number and bytes."""

    def __init__(self, entries: int = ENTRIES, size: int = BYTES) -> None:
        self._entries, self._limit = entries, size
        self._held: OrderedDict[bytes, tuple[float, Combined]] = OrderedDict()
        self._size = 0
        self.hits, self.generation = 0, 0

    def get(self, key: bytes, now: float) -> Combined | None:
        """A result that is not too old."""
        found = self._held.get(key)
        if found is None:
            return None
        if now - found[0] > KEPT_S:
            self._drop(key)
            return None
        self.hits += 1
        return found[1]

    def put(self, key: bytes, combined: Combined, now: float, generation: int = 0) -> None:
        """Keep a result whose verdicts stand on the ledger; the oldest make room.

        `generation` is the cache's when the work began: what was under way when all was forgotten is not kept either.
        """
        if key in self._held or generation != self.generation:
            return
        self._held[key] = (now, combined)
        self._size += combined.size
        while len(self._held) > self._entries or self._size > self._limit:
            self._drop(next(iter(self._held)))

    def clear(self) -> None:
        """Forget all: somebody on whose word some of it may rest has been refuted."""
        self._held.clear()
        self._size = 0
        self.generation += 1

    def _drop(self, key: bytes) -> None:
        _, combined = self._held.pop(key)
        self._size -= combined.size
