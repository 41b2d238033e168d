"""Route: which agents get a task. At random among those in good standing, weighted by load; owners kept apart."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.standing import Standing


@dataclass(frozen=True)
class Eligible:
    """An agent that could take a task now."""

    agent: str
    owner: str
    standing: Standing
    load: int


def choose_agents(
    eligible: Sequence[Eligible],
    count: int,
    randomness: random.Random,
    *,
    taken_owners: Collection[str] = (),
    distinct_owners: bool = False,
) -> list[str]:
    """Up to `count` agents, drawn without replacement with weight 1 / (1 + tasks in hand).

    With `distinct_owners` no two of them, nor one already asked, have one owner: rather fewer than that.
    """
    chosen: list[str] = []
    owners = set(taken_owners)
    pool = list(eligible)
    while pool and len(chosen) < count:
        candidates = [e for e in pool if e.owner not in owners] if distinct_owners else pool
        if not candidates:
            break
        pick = randomness.choices(candidates, [1.0 / (1 + e.load) for e in candidates])[0]
        chosen.append(pick.agent)
        owners.add(pick.owner)
        pool.remove(pick)
    return chosen
