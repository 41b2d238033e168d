"""Route: agents drawn by load, owners kept apart, nobody asked who may not be."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bmoe.ledger.rules.standing import Standing
from coordinator.route import Eligible, choose_agents

POOLS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=12).map(
    lambda drawn: [
        Eligible(f"agent-{i}", f"owner-{owner}", Standing.TRUSTED, load) for i, (owner, load) in enumerate(drawn)
    ]
)


@given(POOLS, st.integers(0, 16), st.integers(0, 2**32), st.sets(st.integers(0, 5)))
def test_distinct_owners_are_distinct_and_none_is_left_out_that_could_be_asked(
    pool: list[Eligible], count: int, seed: int, taken: set[int]
) -> None:
    owner = {e.agent: e.owner for e in pool}
    excluded = {f"owner-{t}" for t in taken}
    chosen = choose_agents(pool, count, random.Random(seed), taken_owners=excluded, distinct_owners=True)
    owners = [owner[a] for a in chosen]
    assert len(set(owners)) == len(owners) and not set(owners) & excluded
    assert len(chosen) == min(count, len(set(owner.values()) - excluded))


@given(POOLS, st.integers(0, 16), st.integers(0, 2**32))
def test_without_that_wish_owners_do_not_matter(pool: list[Eligible], count: int, seed: int) -> None:
    chosen = choose_agents(pool, count, random.Random(seed), taken_owners={e.owner for e in pool})
    assert len(chosen) == len(set(chosen)) == min(count, len(pool))
    assert set(chosen) <= {e.agent for e in pool}


def test_one_owner_with_many_boards_gets_one_replica() -> None:
    """A Sybil enrols nine boards under one name: it never holds both replicas of a task."""
    pool = [Eligible(f"sybil-{i}", "mallory", Standing.TRUSTED, 0) for i in range(9)]
    pool.append(Eligible("honest", "ada", Standing.TRUSTED, 50))
    for seed in range(50):
        chosen = choose_agents(pool, 2, random.Random(seed), distinct_owners=True)
        assert len(chosen) == 2 and "honest" in chosen


def test_the_idle_are_drawn_in_proportion_to_their_idleness() -> None:
    """Weights 1 and 1/4: of 5,000 draws 4,000 are expected, with a deviation of 28; the bounds are seven of them."""
    pool = [Eligible("idle", "a", Standing.TRUSTED, 0), Eligible("busy", "b", Standing.TRUSTED, 3)]
    chance = random.Random(7)
    drawn = Counter(choose_agents(pool, 1, chance)[0] for _ in range(5000))
    assert 3800 < drawn["idle"] < 4200


def test_equals_are_drawn_alike_and_the_pool_is_left_as_it_was() -> None:
    pool = [Eligible(f"agent-{i}", f"owner-{i}", Standing.TRUSTED, 2) for i in range(5)]
    before, chance = list(pool), random.Random(3)
    pairs = Counter(frozenset(choose_agents(pool, 2, chance, distinct_owners=True)) for _ in range(4000))
    assert len(pairs) == 10 and all(300 < n < 500 for n in pairs.values()) and pool == before


def test_nobody_there_is_no_error() -> None:
    assert choose_agents([], 2, random.Random(1), distinct_owners=True) == []
