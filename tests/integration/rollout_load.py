"""Clients that ask while a version is rolled out, and the rollout's row once it is as wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.fleet import LocalFleet
from bmoe.protocol.errors import BmoeError

X = np.array([[1, 2, 3, 4], [0.5, -1, 0, 2]], np.float32)


class Load:
    """Clients that ask without a pause; `seen` are the versions whose weights the answers are right by, 0 for none."""

    def __init__(self, fleet: LocalFleet, model: str, weights: dict[int, np.ndarray]) -> None:
        self._fleet, self._model, self._weights = fleet, model, weights
        self.seen: set[int] = set()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    async def __aenter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _ask(self) -> None:
        client = self._fleet.client()
        while not self._stop.is_set():
            try:
                y = client.infer(self._model, {"x": X}).outputs["y"]
            except BmoeError as error:
                self.failures.append(str(error))
                self._stop.wait(0.1)
            else:
                self.seen.add(next((v for v, w in self._weights.items() if np.allclose(y, X @ w, atol=1e-5)), 0))
        client.close()


async def until(fleet: LocalFleet, model: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The rollout's row once it is as wanted; the coordinator may be away meanwhile."""
    client, row = fleet.client(), {}
    try:
        async with asyncio.timeout(60):
            while not row or not holds(row):
                await asyncio.sleep(0.1)
                try:
                    row = next(r for r in await asyncio.to_thread(client.rollouts) if r["model"] == model)
                except BmoeError:
                    continue
    except TimeoutError:
        pytest.fail(f"it stands at {row}")
    finally:
        client.close()
    return row
