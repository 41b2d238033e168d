"""Models as a source needs them: what the registrar signed of one, from the gateway or, without it, as last kept."""

from __future__ import annotations

import logging
from pathlib import Path

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import ConfigError, InputError, RefusedError, UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.protocol.messages import ModelRelease, open_message
from bmoe.protocol.schema import is_name
from bmoe.protocol.threads import in_thread
from edge_agent.experts import Experts
from edge_agent.fleet import FleetClient
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")


class Models:
    """Fetches models' statements and keeps the last of each in a folder."""

    def __init__(self, folder: Path, fleet: FleetClient, experts: Experts, registrar: bytes, ledger: bytes) -> None:
        self._folder, self._fleet, self._experts = folder, fleet, experts
        self._registrar, self._ledger = registrar, ledger

    async def get(self, name: str) -> ReleasedModel:
        """The model as the gateway serves it now; if that cannot be reached, as it was kept.

        Raises RefusedError if the gateway has none of that name, UnavailableError where nothing is kept either.
        """
        if not is_name(name):
            raise ConfigError(f"a model's name has 1..64 characters a-z 0-9 and inner '-', found {name[:64]!r}")
        try:
            return await in_thread(lambda: self._get(name))
        except OSError as error:
            raise UnavailableError(f"model {name} cannot be stored: {error.strerror}") from None

    def _get(self, name: str) -> ReleasedModel:
        path = self._folder / f"{name}.model"
        try:
            raw = self._fleet.get(f"/v1/models/{name}")
            statement = self._checked(raw, name)
            write_durably(path, raw)
        except UnavailableError as error:
            if not path.exists():
                raise
            log.info(event("model_not_refreshed", model=name, reason=error))
            statement = self._checked(path.read_bytes(), name)
        gate = self._experts.release(statement.gate) if statement.gate else None
        return ReleasedModel(statement, gate, tuple(self._experts.release(digest) for digest in statement.experts))

    def _checked(self, raw: bytes, name: str) -> ModelRelease:
        sealed = open_message(ModelRelease, raw)
        sealed.verify(self._registrar)
        statement = sealed.header
        if (statement.model, statement.ledger) != (name, self._ledger):
            raise RefusedError(f"the statement served for model {name} is of {statement.model}")
        if not statement.experts:
            raise InputError(f"model {name} has no experts")
        return statement
