"""A coordinator killed at a named stage, and what the clients of that moment learn of their requests afterwards."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fault_tools import CALL_S, MODEL, SHAPE, end_of, gateway_pid, until
from ledger_check import LedgerFacts

from benchmarks.fleet import LocalFleet
from bmoe.protocol.messages import Promise, open_message

KILLABLE = Path(__file__).parent / "killable"
ROOT = Path(__file__).parents[2]
BACK_S = 30.0


@dataclass
class Asked:
    """One request: what its client was told at the time, if anything, and what the gateway says of it at last."""

    id: str
    wait: str
    told: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None


def killable(order: Path) -> dict[str, str]:
    """The environment in which a coordinator obeys the file `order`."""
    return {"KILL_COORDINATOR_AT": str(order), "PYTHONPATH": f"{KILLABLE}{os.pathsep}{ROOT}"}


class Kills:
    """Kills the coordinator of a fleet at stages, with requests in work; `asked` are all of them."""

    def __init__(self, fleet: LocalFleet, order: Path) -> None:
        self._fleet, self._order = fleet, order
        self._pool = ThreadPoolExecutor(8)
        self.asked: list[Asked] = []

    async def at(self, stage: str, waits: tuple[str, ...] = ("decided", "committed")) -> list[Asked]:
        """Ask, see the coordinator die at the stage, and learn from its successor what became of each request."""
        ended = asyncio.ensure_future(end_of(gateway_pid(self._fleet, "coordinator"), CALL_S))
        self._order.write_text(stage)
        asked = [Asked(uuid.uuid4().hex, wait) for wait in waits]
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(self._pool, self._ask, one) for one in asked]
        if stage == "held":
            await asyncio.gather(*calls)
            os.kill(gateway_pid(self._fleet, "coordinator"), signal.SIGKILL)
            self._order.unlink()
        await ended
        await asyncio.gather(*calls)
        assert not self._order.exists(), f"the coordinator never came to {stage!r}"
        for one in asked:
            await until(lambda one=one: self._settled(one), BACK_S, f"{stage}: the outcome of a {one.wait} request")  # type: ignore[misc]
        self.asked += asked
        return asked

    def _ask(self, one: Asked) -> None:
        window = np.random.default_rng(int(one.id[:8], 16)).standard_normal(SHAPE).astype(np.float32)
        tensor = {"name": "window", "shape": list(SHAPE), "datatype": "FP32", "data": window.reshape(-1).tolist()}
        body = {"id": one.id, "inputs": [tensor], "parameters": {"wait": one.wait}}
        try:
            one.told = self._http(f"/v2/models/{MODEL}/infer", json.dumps(body).encode())
        except OSError:
            pass  # it died: that is what we are here for

    async def _settled(self, one: Asked) -> bool:
        try:
            one.outcome = await asyncio.to_thread(self._http, f"/v1/requests/{one.id}")
        except urllib.error.HTTPError as error:
            one.outcome = None
            return error.code == 404  # never accepted
        except OSError:
            return False
        return one.outcome["status"] != "accepted"

    def _http(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        with urllib.request.urlopen(self._fleet.url + path, body, timeout=CALL_S) as reply:
            return json.loads(reply.read())

    def check(self, facts: LedgerFacts) -> None:
        """Whoever was accepted has an answer that stands on the ledger; whoever was told one has that very one."""
        for one in self.asked:
            if one.outcome is None:
                assert one.told is None, f"answered, and yet unknown: {one}"
                continue
            assert one.outcome["status"] == "answered", one
            response = one.outcome["response"]
            entry = facts.answers[bytes.fromhex(response["parameters"]["request"])]
            assert [task.hex() for task in entry.tasks] == response["parameters"]["verdicts"]
            assert all(facts.verdicts[task].outcome == "accepted" for task in entry.tasks)
            if one.told is not None:
                told = one.told["parameters"]
                if not response["parameters"]["promise"]:  # found on the ledger, which needs none
                    assert told["stage"] == "committed"
                    response["parameters"]["promise"] = told["promise"]
                assert one.told == response
                promise = open_message(Promise, base64.b64decode(told["promise"])).header
                assert promise.result_root == entry.result_root and promise.tasks == entry.tasks
                assert entry.time_ms <= promise.deadline_ms, "the promise was not kept in time"
