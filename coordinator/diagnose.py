"""Diagnose: agents in quarantine get tasks of known answers, for a broken board is not a liar.

The tasks are copies of recent real ones, so that nothing in their form tells them apart; the referee re-executes each.
"""

from __future__ import annotations

import asyncio
from collections import deque

from bmoe.ledger.rules.standing import Standing
from coordinator.decide import Decider
from coordinator.fleet import Fleet
from coordinator.jobs import Call, Job
from coordinator.share import make_job

EVERY_S = 2.0
RECENT = 32
ROWS_MAX = 8


class Diagnosis:
    """Remembers recent inputs and gives them to those in quarantine, one each at a time."""

    def __init__(self, fleet: Fleet, decider: Decider) -> None:
        self._fleet, self._decider = fleet, decider
        self._recent: deque[Job] = deque(maxlen=RECENT)

    def remember(self, job: Job) -> None:
        """Keep a small job as material."""
        if job.binding.rows <= ROWS_MAX:
            self._recent.append(job)

    async def run(self) -> None:
        """For ever: every two seconds, one task for each agent in quarantine that is online."""
        while True:
            await asyncio.sleep(EVERY_S)
            for eligible in self._fleet.eligible((), standing=(Standing.QUARANTINED,)):
                if not self._recent or eligible.load:
                    continue
                old = self._recent[0]
                self._recent.rotate(-1)
                call = Call("diagnosis", old.expert, "diagnosis", old.inputs, old.binding.rows)
                call.done.add_done_callback(lambda f: f.cancelled() or f.exception())
                self._decider.start(make_job((call,), self._decider.ledger_ms()), only=eligible.agent)
