"""Bringing a version to agents: an update message to each, and pieces over Flower to those whose SuperNode is online.

Nothing here is relied on: an agent that has not said it holds the version is told again, and pushed what it lacks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.protocol.errors import BmoeError
from coordinator.flower.layout import FlowerLayout
from coordinator.flower.post import Post
from coordinator.flower.register import read_nodes
from coordinator.rollout.parcel import Parcel, pieces

log = structlog.get_logger("rollout")
TELL_AGAIN_S = 20.0
# To whoever never says a word the message is repeated more and more seldom.
TOLD_OFTEN, TELL_SELDOM_S = 9, 600.0
# An agent installs one version at a time: that of another model's rollout waits so long for its turn.
TURN_S = 120.0
PUSH_S = 300.0
AGAIN_S = 5.0
# A board to which Flower brings nothing in so many tries, one after the other, fetches over HTTPS: flwr itself gives a
# ClientApp 30 seconds to start, which a board that is busy all day may not manage.
FAILURES = 5
# Nobody has asked for so long: how long a bridge has been away by then says nothing.
IDLE_S = 10.0


@dataclass
class _Errand:
    """What is under way for one agent of one rollout."""

    by: str = ""
    told: float = -TELL_SELDOM_S
    times: int = 0
    pushing: asyncio.Task[None] | None = None
    have: dict[str, int] = field(default_factory=dict)
    failures: int = 0


class Carrier:
    """One a coordinator. `tell(agent, rollout, carrier)` publishes the update; `parcel(rollout)` gives what to push.

    `post()` is where a bridge calls, once it can. For `patience_s` a bridge is waited for, at first and whenever it has
    gone; after that releases go over HTTPS until there is one.
    """

    def __init__(
        self,
        layout: FlowerLayout,
        post: Callable[[], Post | None],
        tell: Callable[[str, Rollout, str], None],
        parcel: Callable[[Rollout], Awaitable[Parcel]],
        patience_s: float,
    ) -> None:
        self._layout, self._post, self._tell, self._parcel = layout, post, tell, parcel
        self._patience_s, self._asked, self._bridged = patience_s, -math.inf, -math.inf
        self._errands: dict[tuple[bytes, str], _Errand] = {}
        self._turns: dict[str, tuple[bytes, float]] = {}

    def bring(self, rollout: Rollout, agents: list[str], over: str) -> None:
        """See to it that these agents, who lack the version, get it; called again and again, costs nothing meanwhile."""
        now, post = time.monotonic(), self._post()
        carrier = "flower" if over == "auto" and self._may_come(post, now) else "https"
        if carrier == "flower" and post is None:
            return  # the SuperLink is being started
        nodes = read_nodes(self._layout) if carrier == "flower" else {}
        for agent in agents:
            if not self._has_turn(agent, rollout.rollout, now):
                continue
            errand = self._errands.setdefault((rollout.rollout, agent), _Errand())
            by = carrier if errand.failures < FAILURES else "https"
            pause = TELL_AGAIN_S if errand.times < TOLD_OFTEN else TELL_SELDOM_S
            if by != errand.by or now - errand.told >= pause:
                errand.by, errand.told, errand.times = by, now, errand.times + 1
                self._tell(agent, rollout, by)
            node = nodes.get(agent) if by == "flower" else None
            if node is None or post is None or node.node not in post.nodes:
                continue
            if errand.pushing is None or errand.pushing.done():
                errand.pushing = asyncio.ensure_future(self._push(post, rollout, agent, node.node, errand))

    def _has_turn(self, agent: str, rollout: bytes, now: float) -> bool:
        """Whether an agent may be told of this rollout: what it is told replaces what it has in work."""
        whose, since = self._turns.get(agent, (rollout, now))
        if whose != rollout and now - since < TURN_S:
            return False
        self._turns[agent] = (rollout, since if whose == rollout else now)
        return True

    def _may_come(self, post: Post | None, now: float) -> bool:
        """Whether a bridge is there, or may still be: SuperNodes are started meanwhile, for that takes as long."""
        if (post is not None and post.connected) or now - self._asked > IDLE_S:
            self._bridged = now
        self._asked = now
        return now - self._bridged < self._patience_s

    def forget(self, rollout: bytes, agents: set[str] | None = None) -> None:
        """These agents have what they need, or the rollout has ended."""
        for key in [k for k in self._errands if k[0] == rollout and (agents is None or k[1] in agents)]:
            errand = self._errands.pop(key)
            if errand.pushing is not None:
                errand.pushing.cancel()
            self._end_turn(rollout, key[1])

    def away(self, rollout: bytes, agents: set[str]) -> None:
        """These agents are away: told at once when they are back, and pushed what they lack from where their copy ends."""
        for (whose, agent), errand in self._errands.items():
            if whose == rollout and agent in agents:
                errand.told, errand.times = -TELL_SELDOM_S, 0
                self._end_turn(rollout, agent)

    def _end_turn(self, rollout: bytes, agent: str) -> None:
        if self._turns.get(agent, (b"", 0.0))[0] == rollout:
            del self._turns[agent]

    async def close(self) -> None:
        """End what is being pushed."""
        pushing = [errand.pushing for errand in self._errands.values() if errand.pushing is not None]
        for task in pushing:
            task.cancel()
        await asyncio.gather(*pushing, return_exceptions=True)

    async def _push(self, post: Post, rollout: Rollout, agent: str, node: int, errand: _Errand) -> None:
        """Push until nothing lacks. What is lost on the way is pushed again from where the agent's copy ends."""
        try:
            parcel = await self._parcel(rollout)
            while True:
                job: dict[str, Any] = {"node": node, "rollout": rollout.rollout.hex(), "sizes": parcel.sizes}
                began = time.monotonic()
                reply = await post.push({**job, "parts": pieces(parcel, errand.have)}, PUSH_S)
                log.info(
                    "pushed", agent=agent, state=reply.get("state"), reason=reply.get("reason", ""),
                    ms=round(1000 * (time.monotonic() - began)),
                )  # fmt: skip
                errand.failures = 0
                if reply.get("state") != "lacking":
                    await asyncio.sleep(AGAIN_S)  # its own word comes over MQTT, or it is tried again
                    return
                have = {str(k): int(v) for k, v in dict(reply["have"]).items()}
                if have == errand.have:  # nothing of it arrived: the disk is full, or another update is in work
                    await asyncio.sleep(AGAIN_S)
                errand.have = have
        except (BmoeError, OSError, LookupError, TypeError, ValueError) as error:
            errand.failures += 1
            log.warning("push_failed", agent=agent, node=node, error=str(error)[:300])
            await asyncio.sleep(AGAIN_S)
