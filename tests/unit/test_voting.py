"""Voting under attack: liars at the edge of the tolerance, colluders, chains, NaN, shuffled order, other processors.

Run as a script it prints the digest of a fixed stream of verdicts, so that another interpreter can be compared.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmoe.ledger.rules.voting import (
    MAX_CANDIDATES,
    Candidate,
    Clique,
    Stance,
    Tolerance,
    accepted,
    distance,
    is_finite,
    largest_clique,
    stance,
)
from bmoe.protocol.errors import ManifestError, MessageError

FORMATS = {"float16": "e", "float32": "f", "float64": "d"}
# What every platform must find: x86 and ARM, numpy 1.26 and 2, Python 3.10 to 3.13. Changing it is a new rules version.
STREAM_DIGEST = "4e6999129890c97f4f6c8d5e8e8c20e5a3138fe0a4fb910b34d032dc2b543eb7"


def pack(values, dtype="float32") -> bytes:
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)


def one_tensor(rows, dtype="float32") -> list[Candidate]:
    return [Candidate(f"agent-{i}", (pack(row, dtype),)) for i, row in enumerate(rows)]


def verdict(candidates, tolerances):
    """All that a vote says, free of indices: accepted bytes, members in order, diameter, every agent's stance."""
    clique = largest_clique(candidates, tolerances)
    medoid = candidates[clique.medoid]
    assert accepted(clique, candidates) is medoid.tensors
    return (
        medoid.tensors,
        [candidates[i].agent for i in clique.members],
        clique.diameter,
        {c.agent: stance(distance(medoid, c, tolerances)) for c in candidates},
    )


# --- the slow twin: no numpy, no bitmasks, every subset tried ---


def slow_distance(x, y, tolerances) -> float:
    worst = 0.0
    for a, b, tolerance in zip(x.tensors, y.tensors, tolerances, strict=True):
        code = FORMATS.get(tolerance.dtype)
        if code is None:
            worst = max(worst, 0.0 if a == b else math.inf)
            continue
        size = struct.calcsize(code)
        for p, q in zip(
            struct.unpack(f"<{len(a) // size}{code}", a), struct.unpack(f"<{len(b) // size}{code}", b), strict=True
        ):
            worst = max(worst, abs(p - q) / tolerance.epsilon)
    return worst


def slow_clique(candidates, tolerances) -> Clique:
    d = [[slow_distance(x, y, tolerances) for y in candidates] for x in candidates]
    name = [(c.digest, c.agent) for c in candidates]
    best = None
    for size in range(len(candidates), 0, -1):
        for subset in itertools.combinations(sorted(range(len(candidates)), key=name.__getitem__), size):
            if all(d[i][j] <= 1 for i in subset for j in subset):
                key = (max(d[i][j] for i in subset for j in subset), [name[i] for i in subset])
                if best is None or key < best[0]:
                    best = (key, subset)
        if best:
            break
    (diameter, _), members = best
    medoid = min(members, key=lambda i: (max(d[i][j] for j in members), name[i]))
    return Clique(members, diameter, medoid)


# --- sets of candidates: hypothesis picks sizes and seed, a plain generator does the rest, many times faster ---


def lattice_set(seed, count):
    """Outputs on a grid of epsilon / 2, some one bit off it: equal bytes, ties, chains and exact boundaries abound."""
    rng = random.Random(seed)
    dtype, epsilon, width = rng.choice(sorted(FORMATS)), rng.choice([2.0**-6, 0.01]), rng.randint(1, 2)
    cast, reach = np.dtype(dtype).type, rng.randint(1, 5)
    candidates = []
    for name in rng.sample(range(count), count):
        row = [cast(rng.randint(-reach, reach) * epsilon / 2) for _ in range(width)]
        if rng.random() < 0.3:
            row[0] = np.nextafter(row[0], cast(rng.choice([-9, 9])))
        label = bytes([rng.random() < 0.1])
        candidates.append(Candidate(f"agent-{name}", (pack(row, dtype), label)))
    return candidates, (Tolerance(dtype, epsilon), Tolerance("bool", 0.0))


def attacked_set(seed, most_honest, most_liars):
    """A strict majority of honest outputs within epsilon of each other, and liars who know them all."""
    rng = random.Random(seed)
    dtype, epsilon, centre = rng.choice(sorted(FORMATS)), rng.choice([0.25, 0.01]), rng.choice([0.0, 1.0, -7.3, 1000.1])
    cast, tolerances = np.dtype(dtype).type, (Tolerance(dtype, epsilon),)
    honest: list[Candidate] = []
    for i in range(most_honest):
        row = [cast(centre + epsilon * rng.choice([0.0, 1.0, rng.random()])) for _ in range(2)]
        output = Candidate(f"honest-{i}", (pack(row, dtype),))
        if all(slow_distance(output, h, tolerances) <= 1 for h in honest):  # rounding to the dtype may push one out
            honest.append(output)
    everyone = list(honest)
    for i in range(min(most_liars, len(honest) - 1, MAX_CANDIDATES - len(honest))):
        target = np.frombuffer(rng.choice(everyone).tensors[0], np.dtype(dtype))  # a copycat, where the step is 0
        step = epsilon * rng.choice([-1, 1]) * rng.choice([0, 0.5, 1, 1, 1, 1, 2, 2, 3, 1000])
        moved = (target.astype(np.float64) + step).astype(dtype)
        if rng.random() < 0.4:  # the last bit this side of the boundary, or the first beyond it
            moved = np.nextafter(moved, rng.choice([target, moved + cast(step)]))
        everyone.append(Candidate(f"liar-{i}", (pack(moved.tolist(), dtype),)))
    rng.shuffle(everyone)
    return everyone, tolerances


many = settings(max_examples=1000, deadline=None)
seeds = st.integers(0, 2**64 - 1)
counts = st.integers(1, MAX_CANDIDATES)


@many
@given(seeds, counts)
def test_order_of_arrival_changes_nothing(seed, count):
    candidates, tolerances = lattice_set(seed, count)
    shuffled = random.Random(seed).sample(candidates, count)
    assert verdict(candidates, tolerances) == verdict(shuffled, tolerances)


@settings(many, max_examples=800)
@given(seeds, st.integers(1, 8))
def test_the_slow_twin_finds_the_same_clique(seed, count):
    candidates, tolerances = lattice_set(seed, count)
    assert largest_clique(candidates, tolerances) == slow_clique(candidates, tolerances)


@many
@given(seeds, counts, counts)
def test_liars_cannot_move_the_answer_past_epsilon_nor_blame_the_honest(seed, most_honest, most_liars):
    everyone, tolerances = attacked_set(seed, most_honest, most_liars)
    honest = [c for c in everyone if c.agent.startswith("honest")]
    assert len(honest) > len(everyone) / 2
    tensors, members, diameter, stances = verdict(everyone, tolerances)
    answer = Candidate("answer", tensors)
    assert len(members) >= len(honest) and diameter <= 1
    assert min(slow_distance(answer, h, tolerances) for h in honest) <= 1
    assert all(stances[h.agent] is not Stance.DISSENT for h in honest)
    far = [c.agent for c in everyone if slow_distance(answer, c, tolerances) > 2]
    assert far == [agent for agent, s in stances.items() if s is Stance.DISSENT]


@many
@given(seeds)
def test_two_steps_of_epsilon_are_never_more_than_two_apart_whatever_the_rounding(seed):
    """Ends are the farthest doubles that still count as within epsilon of the middle, where subtraction rounds."""
    rng = random.Random(seed)
    middle, epsilon = rng.uniform(-1, 1) * 10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-9, 1)
    starts = np.array([middle - epsilon, middle + epsilon])
    ends = np.concatenate([starts, np.nextafter(starts, -math.inf), np.nextafter(starts, math.inf)])
    ends = [end for end in ends.tolist() if abs(end - middle) / epsilon <= 1]
    centre, *outputs = one_tensor([[middle], *([end] for end in ends)], "float64")
    tolerances = (Tolerance("float64", epsilon),)
    assert all(distance(centre, x, tolerances) <= 1 for x in outputs)
    assert distance(*one_tensor([[min(ends)], [max(ends)]], "float64"), tolerances) <= 2


@settings(many, max_examples=500)
@given(st.sampled_from(sorted(FORMATS)), st.data(), st.floats(1e-300, 1e300))
def test_distance_is_symmetric_and_zero_on_equality_for_any_finite_floats(dtype, data, epsilon):
    width = {"float16": 16, "float32": 32, "float64": 64}[dtype]
    row = st.lists(st.floats(width=width, allow_nan=False, allow_infinity=False), min_size=2, max_size=2)
    x, y = one_tensor([data.draw(row), data.draw(row)], dtype)
    tolerances = (Tolerance(dtype, epsilon),)
    assert distance(x, y, tolerances) == distance(y, x, tolerances) == slow_distance(x, y, tolerances)
    assert distance(x, x, tolerances) == distance(x, Candidate("twin", x.tensors), tolerances) == 0.0


# --- single stories ---


def test_a_chain_is_not_a_clique():
    """A~B~C with A and C apart: B agrees with both, and no order makes all three one group."""
    chain = one_tensor([[0.0], [0.9], [1.8]])
    tolerances = (Tolerance("float32", 1.0),)
    verdicts = [verdict(list(order), tolerances) for order in itertools.permutations(chain)]
    assert all(v == verdicts[0] for v in verdicts)
    assert len(verdicts[0][1]) == 2


def test_a_long_chain_cannot_carry_the_answer_away():
    """Each liar agrees with the one before; only the first is near enough to join the honest, or to be the answer."""
    honest = one_tensor([[0.0]] * 4)
    chain = [Candidate(f"link-{i}", (pack([0.75 * i]),)) for i in range(1, 12)]
    tensors, members, _, stances = verdict(honest + chain, (Tolerance("float32", 1.0),))
    assert set(members) == {h.agent for h in honest} | {"link-1"}
    assert tensors[0] in (pack([0.0]), pack([0.75]))
    assert all(stances[f"link-{i}"] is Stance.DISSENT for i in range(4, 12))


def test_exactly_epsilon_agrees_and_the_next_float_does_not():
    epsilon = 2.0**-10
    at, beyond = epsilon, np.nextafter(np.float32(epsilon), np.float32(1)).item()
    tolerances = (Tolerance("float32", epsilon),)
    zero, edge, outside = one_tensor([[0.0], [at], [beyond]])
    assert stance(distance(zero, edge, tolerances)) is Stance.AGREE
    assert stance(distance(zero, outside, tolerances)) is Stance.NEUTRAL
    assert stance(2.0) is Stance.NEUTRAL
    assert stance(math.nextafter(2.0, 3.0)) is stance(math.inf) is stance(math.nan) is Stance.DISSENT


def test_colluders_in_the_minority_lose_even_with_identical_bytes():
    honest = one_tensor([[0.0], [1e-6], [2e-6]])
    liars = [Candidate(f"liar-{i}", (pack([5.0]),)) for i in range(2)]
    _, members, _, stances = verdict(liars + honest, (Tolerance("float32", 1e-5),))
    assert set(members) == {h.agent for h in honest}
    assert [stances[liar.agent] for liar in liars] == [Stance.DISSENT] * 2


def test_of_two_equal_camps_the_tighter_wins_then_the_lower_digest():
    tolerances = (Tolerance("float32", 1.0),)
    loose, tight = [[0.0], [0.5]], [[9.0], [9.25]]
    assert set(verdict(one_tensor(loose + tight), tolerances)[1]) == {"agent-2", "agent-3"}
    camps = one_tensor([[0.0], [0.0], [9.0], [9.0]])
    lowest = min(camps, key=lambda c: c.digest)
    assert verdict(camps, tolerances)[0] == lowest.tensors


def test_the_worst_graph_for_clique_search_still_ends_and_is_order_free():
    """Moon and Moser's graph on 16 vertices, 324 maximal cliques: groups of 3, 3, 3, 3 and 4 rivals."""
    groups, rows = (3, 3, 3, 3, 4), []
    axes = [(g, pair) for g, size in enumerate(groups) for pair in itertools.combinations(range(size), 2)]
    for g, size in enumerate(groups):
        for member in range(size):
            rows.append([(1.0, -1.0)[pair.index(member)] if h == g and member in pair else 0.0 for h, pair in axes])
    candidates, tolerances = one_tensor(rows), (Tolerance("float32", 1.0),)
    first = verdict(candidates, tolerances)
    assert len(first[1]) == len(groups)
    assert verdict(candidates[::-1], tolerances) == first


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_colluders_with_identical_nan_bytes_are_refused_by_name(dtype, bad):
    tolerances = (Tolerance("bool", 0.0), Tolerance(dtype, 0.5))
    good = Candidate("honest", (b"\1", pack([1.0, 2.0], dtype)))
    liars = [Candidate(f"liar-{i}", (b"\1", pack([1.0, bad], dtype))) for i in range(2)]
    assert [is_finite(c, tolerances) for c in (good, *liars)] == [True, False, False]
    with pytest.raises(MessageError, match="liar-0"):
        largest_clique([good, *liars], tolerances)
    assert verdict([c for c in (good, *liars) if is_finite(c, tolerances)], tolerances)[1] == ["honest"]
    assert distance(good, liars[0], tolerances) == math.inf


@pytest.mark.parametrize(
    "dtype, code", [("int8", "b"), ("uint16", "H"), ("int32", "i"), ("int64", "q"), ("uint64", "Q")]
)
def test_integers_compare_bytewise(dtype, code):
    tolerances = (Tolerance(dtype, 0.0),)
    top = 2 ** (8 * struct.calcsize(code) - 1) - 1  # beyond 2^53 float64 could not tell these two apart
    x, y, z = (Candidate(str(i), (struct.pack(f"<{code}", v),)) for i, v in enumerate((top, top - 1, top)))
    assert distance(x, z, tolerances) == 0.0
    assert distance(x, y, tolerances) == math.inf
    assert is_finite(Candidate("bits of a float NaN", (b"\xff" * 8,)), tolerances)


def test_a_wrong_label_dissents_though_all_scores_agree():
    tolerances = (Tolerance("float32", 1e-3), Tolerance("int64", 0.0))
    said = [Candidate(f"agent-{i}", (pack([0.5]), struct.pack("<q", label))) for i, label in enumerate((7, 7, 8))]
    assert verdict(said, tolerances)[3]["agent-2"] is Stance.DISSENT


def test_float_with_epsilon_zero_asks_for_equal_numbers():
    tolerances = (Tolerance("float32", 0.0),)
    zero, minus, tiny = one_tensor([[0.0], [-0.0], [1e-45]])
    assert distance(zero, minus, tolerances) == 0.0
    assert distance(zero, tiny, tolerances) == math.inf


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 20000])
def test_a_lie_in_one_element_of_a_large_output_is_seen(size, place):
    row = np.linspace(-1, 1, size, dtype="<f4")
    lie = row.copy()
    lie[place] += 1
    tolerances = (Tolerance("float32", 0.25),)
    said = [Candidate(name, (r.tobytes(),)) for name, r in (("a", row), ("liar", lie), ("b", row + np.float32(1e-3)))]
    assert distance(said[0], said[1], tolerances) == pytest.approx(4.0)
    assert set(verdict(said, tolerances)[1]) == {"a", "b"}


@pytest.mark.filterwarnings("error")
def test_a_difference_too_large_for_float64_is_infinite_and_prints_no_warning():
    low, high, endless, worse = one_tensor([[-1.7e308, 0], [1.7e308, 0], [math.inf, 0], [math.inf, 1]], "float64")
    tolerances = (Tolerance("float64", 1.0),)
    assert distance(low, high, tolerances) == distance(endless, worse, tolerances) == math.inf
    assert verdict([low, high], tolerances)[1] in (["agent-0"], ["agent-1"])


def test_outputs_of_different_or_no_length():
    tolerances = (Tolerance("float32", 1.0),)
    short, long, *empty = (Candidate(str(i), (pack([0.0] * n),)) for i, n in enumerate((1, 2, 0, 0)))
    assert distance(short, long, tolerances) == math.inf
    assert verdict([short, long, *empty], tolerances)[:2] == ((b"",), ["2", "3"])


def test_the_digest_tells_where_one_tensor_ends():
    assert Candidate("a", (b"ab", b"")).digest != Candidate("a", (b"a", b"b")).digest
    assert Candidate("a", (b"xy",)).digest == hashlib.sha256(bytes([0] * 7 + [2]) + b"xy").digest()


def test_none_one_and_too_many():
    tolerances = (Tolerance("float32", 1.0),)
    assert largest_clique([], tolerances) is None
    assert largest_clique(one_tensor([[3.0]]), tolerances) == Clique((0,), 0.0, 0)
    assert len(largest_clique(one_tensor([[3.0]] * 16), tolerances).members) == 16
    with pytest.raises(MessageError, match="at most 16 candidates, got 17"):
        largest_clique(one_tensor([[3.0]] * 17), tolerances)


def test_an_agent_cannot_vote_twice():
    with pytest.raises(MessageError, match="'mallory' has more than one"):
        largest_clique([Candidate("mallory", (pack([v]),)) for v in (1.0, 2.0)], (Tolerance("float32", 1.0),))


@pytest.mark.parametrize("tensors, fact", [((b"\0" * 3,), "multiple of 4"), ((), "expected 1"), ((b"", b""), "got 2")])
def test_tensors_that_do_not_fit_are_refused_with_the_facts(tensors, fact):
    tolerances = (Tolerance("float32", 1.0),)
    bad = Candidate("odd", tensors)
    for refused in (lambda: largest_clique([bad], tolerances), lambda: distance(bad, bad, tolerances)):
        with pytest.raises(MessageError, match=fact):
            refused()


@pytest.mark.parametrize(
    "dtype, epsilon",
    [("bfloat16", 1.0), ("float32", -1.0), ("float32", math.nan), ("float32", math.inf), ("int8", 1.0)],
)
def test_a_tolerance_that_means_nothing_is_refused(dtype, epsilon):
    with pytest.raises(ManifestError):
        Tolerance(dtype, epsilon)


# --- the same bits elsewhere ---


def stream_digest(count: int = 600) -> str:
    """SHA-256 over the verdicts of a fixed stream of sets, each in an order that the process's hash seed decides."""
    rng = random.Random(2509)
    h = hashlib.sha256()
    for _ in range(count):
        dtype, epsilon, width = rng.choice(sorted(FORMATS)), rng.choice([0.01, 0.25, 3e-5]), rng.choice([1, 3, 40])
        base = [rng.uniform(-2, 2) for _ in range(width)]
        sets = {}
        for i in range(rng.randint(1, MAX_CANDIDATES)):
            scale = rng.choice([0.0, 0.3, 0.5, 1.0, 3.0]) * epsilon
            sets[f"agent-{i}"] = pack([b + rng.uniform(-scale, scale) for b in base], dtype)
        tolerances = (Tolerance(dtype, epsilon),)
        candidates = [Candidate(name, (sets[name],)) for name in set(sets)]
        tensors, members, diameter, stances = verdict(candidates, tolerances)
        said = sorted((name, s.value) for name, s in stances.items())
        h.update(tensors[0] + repr((members, diameter.hex(), said)).encode())
    return h.hexdigest()


@pytest.mark.parametrize("hash_seed, simd", [("1", True), ("2", False)], ids=["other-hash-seed", "other-vector-width"])
def test_a_second_process_finds_the_same_verdicts(hash_seed, simd):
    found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "NPY_DISABLE_CPU_FEATURES": "" if simd else " ".join(found)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (STREAM_DIGEST, "")


if __name__ == "__main__":
    print(stream_digest())
