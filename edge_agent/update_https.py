"""`python -m edge_agent.update_https --state DIR`: the wanted version fetched over the fleet's HTTPS, and installed.

For boards without flwr, with little memory or an older Python, and where Flower brought nothing. The same core, the
same files: what has arrived over Flower is not fetched again.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bmoe.protocol.errors import BmoeError, ConfigError, RefusedError, UnknownError
from edge_agent import logs
from edge_agent.fleet import FleetClient
from edge_agent.identity import load_identity
from edge_agent.install_version import Source, install, keep
from edge_agent.logs import event
from edge_agent.trusted import fleet_client
from edge_agent.wanted import FOLDER, Result, Wanted, read_wanted

log = logging.getLogger("bmoe.agent")
PREFIX = "/v1/repository/"
TRIES = 5
AGAIN_S = 5.0


class Gateway:
    """The repository as the gateway serves it: a Source of the update core."""

    def __init__(self, fleet: FleetClient) -> None:
        self._fleet = fleet

    def read(self, path: str, limit: int) -> bytes:
        """A small file; raises UnknownError where the gateway has none, UnavailableError where it cannot be reached."""
        try:
            return self._fleet.get(PREFIX + path, limit)
        except RefusedError as error:
            raise UnknownError(str(error)) from None

    def stream(self, path: str, offset: int, limit: int) -> Iterator[bytes]:
        """The file from `offset` on; raises as `read` does."""
        try:
            yield from self._fleet.stream(PREFIX + path, offset, limit)
        except RefusedError as error:
            raise UnknownError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 once the version is installed or refused, 1 where it could not be had."""
    parser = argparse.ArgumentParser(prog="edge_agent.update_https", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    state = parser.parse_args(argv).state
    logs.set_up("info", "text")
    try:
        wanted = read_wanted(state)
        if wanted is None:
            raise ConfigError(f"{state / FOLDER} says of no version that it is wanted")
    except BmoeError as error:
        log.error(event("update_failed", reason=error))
        return 1
    try:
        source = Gateway(fleet_client(load_identity(state)))
    except BmoeError as error:  # no try of ours mends that
        log.error(event("update_failed", reason=error))
        keep(state, Result(wanted.rollout, "failed", str(error)))
        return 1
    for left in reversed(range(TRIES)):
        result = _tried(state, wanted, source)
        log.info(event("install", state=result.state, reason=result.reason))
        if result.state != "failed":
            return 0
        if left:
            time.sleep(AGAIN_S)
    return 1


def _tried(state: Path, wanted: Wanted, source: Source) -> Result:
    """One try; whatever goes wrong is the agent's to tell, also a fault of ours."""
    try:
        return install(state, wanted, source)
    except BmoeError as error:
        return keep(state, Result(wanted.rollout, "failed", str(error)))
    except Exception as error:
        log.exception(event("fault", where="updater", error=repr(error)))
        return keep(state, Result(wanted.rollout, "failed", f"a fault of the updater: {error!r}"))


if __name__ == "__main__":
    sys.exit(main())
