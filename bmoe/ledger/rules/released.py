"""A model as the ledger has released it: what its statement and its parts' releases say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.protocol.messages import ModelRelease, Release


@dataclass(frozen=True)
class ReleasedModel:
    """A model's signed statement, and the releases of its gate, if it has one, and of its experts in order."""

    statement: ModelRelease
    gate: Release | None
    experts: tuple[Release, ...]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.statement.model

    @property
    def batch(self) -> bool:
        """Whether axis 0 of every tensor is the row axis."""
        return self.experts[0].batch

    @property
    def inputs(self) -> Sequence[Sequence[Any]]:
        """[name, dtype, dims with 0 for any] of each input."""
        return self.experts[0].inputs
