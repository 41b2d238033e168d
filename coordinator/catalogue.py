"""The models that the ledger has released, as requests need them."""

from __future__ import annotations

from collections.abc import Callable

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import MessageError, UnknownError
from bmoe.protocol.messages import ModelRelease
from coordinator.intake import DATATYPE_OF


class Catalogue:
    """Looks models up in the ledger's state, anew each time: releases may change while a model's statement stays.

    `use` gives the version of a model to be used now, and raises UnavailableError where none may be used yet.
    """

    def __init__(self, state: State, use: Callable[[str], ModelRelease | None] | None = None) -> None:
        self._state, self._use = state, use or state.models.get

    def names(self) -> list[str]:
        """Models that can be asked for."""
        return sorted(self._state.models)

    def get(self, name: str) -> ReleasedModel:
        """A released model; raises UnknownError naming those there are, UnavailableError for one that is not final yet."""
        statement = self._use(name)
        if statement is None:
            raise UnknownError(
                f"model {name[:64]!r} is not served here; there are: {', '.join(self.names()) or 'none'}"
            )
        return self._served(statement)

    def version(self, name: str, version: int) -> ReleasedModel:
        """A version that was ever released, for a request that named it then; raises MessageError for any other."""
        statement = self._state.versions.get((name, version))
        if statement is None:
            raise MessageError(f"model {name[:64]!r} version {version} is not on this ledger")
        return self._served(statement)

    def _served(self, statement: ModelRelease) -> ReleasedModel:
        releases = self._state.releases
        gate = releases[statement.gate] if statement.gate else None
        return ReleasedModel(statement, gate, tuple(releases[d] for d in statement.experts))

    def check_version(self, name: str, version: str | None) -> None:
        """Raise UnknownError unless the model is served in this version; None is whichever is."""
        served = self.get(name).statement
        if version is not None and version != str(served.version):
            raise UnknownError(f"model {name} version {version[:32]!r} is not served here; {served.version} is")

    def metadata(self, name: str) -> dict[str, object]:
        """A model's metadata, as the Open Inference Protocol has it."""
        model = self.get(name)
        return {
            "name": model.name,
            "versions": [str(model.statement.version)],
            "platform": "onnx_moe",
            "inputs": [_tensor(s, model.batch) for s in model.experts[0].inputs],
            "outputs": [_tensor(s, model.batch) for s in model.experts[0].outputs],
        }


def _tensor(spec: tuple[object, ...], batch: bool) -> dict[str, object]:
    dims = list(spec[2])  # type: ignore[call-overload]
    shape = [-1 if d == 0 or (batch and i == 0) else d for i, d in enumerate(dims)]
    return {"name": spec[0], "datatype": DATATYPE_OF.get(str(spec[1]), str(spec[1]).upper()), "shape": shape}
