"""Voting: which of the agents' outputs for one task agree, and whose signed bytes stand for them.

A pure function of a set: no order of arrival, no clock, no hash seed, no float sum decides anything, so every validator
and auditor finds the same bytes. The distance takes only the correctly rounded IEEE operations subtract, abs, max and
divide, whose results do not depend on the processor or on the width of its vectors. Method: DESIGN.md section 5.

Why it holds. Let the honest outputs lie pairwise within d <= 1 and be more than half of the candidates. They form a
clique, so the largest clique is at least as big and shares a member with them: the accepted output is within epsilon of
an honest one, and within 2 epsilon of all, so no honest agent dissents. The last step is the triangle inequality, which
survives rounding here: two differences that each round to at most epsilon add up to one that rounds to at most
2 epsilon (ties go to even). A relative tolerance would break it.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bmoe.protocol.errors import ManifestError, MessageError
from bmoe.protocol.tensors import ITEM_BYTES

AGREE = 1.0
NEUTRAL = 2.0
MAX_CANDIDATES = 16  # 324 maximal cliques at worst (Moon & Moser 1965)

_FLOATS: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
_CHUNK = 4096  # elements taken at once: 16 rows of float64 stay in the cache, and memory does not grow with the output


@dataclass(frozen=True)
class Tolerance:
    """How far one output tensor may differ, from the manifest: numpy dtype name, absolute epsilon in the tensor's unit.

    Epsilon is 0 for integers and bool, which compare bytewise; 0 for floats asks for equal numbers (-0.0 equals 0.0).
    Raises ManifestError for an unknown dtype or an epsilon that is negative, not finite, or not 0 for an integer.
    """

    dtype: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ManifestError(f"dtype {self.dtype!a} is not one of {', '.join(ITEM_BYTES)}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ManifestError(f"epsilon must be finite and not negative, got {self.epsilon!a} for {self.dtype}")
        if self.dtype not in _FLOATS and self.epsilon != 0:
            raise ManifestError(f"epsilon must be 0 for {self.dtype}, which compares bytewise, got {self.epsilon!a}")


@dataclass(frozen=True)
class Candidate:
    """One agent's output: little-endian bytes per tensor, in manifest order, lengths already checked against dims."""

    agent: str
    tensors: tuple[bytes, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over each tensor's length (uint64, big-endian) and bytes. Unsalted, for a salt could be ground."""
        h = hashlib.sha256()
        for tensor in self.tensors:
            h.update(len(tensor).to_bytes(8, "big"))
            h.update(tensor)
        return h.digest()


class Stance(enum.Enum):
    """Where an output stands to the accepted one. Neutral earns nothing and costs nothing."""

    AGREE = "agree"
    NEUTRAL = "neutral"
    DISSENT = "dissent"


@dataclass(frozen=True)
class Clique:
    """Candidates that all lie within d <= 1 of each other. Members and medoid are indices into the candidates given.

    `members` are ordered by (digest, agent); `diameter` is their largest distance; `medoid` is the member whose
    farthest fellow is nearest.
    """

    members: tuple[int, ...]
    diameter: float
    medoid: int


def is_finite(candidate: Candidate, tolerances: Sequence[Tolerance]) -> bool:
    """True if no float tensor holds a NaN or an infinity. Raises MessageError if the tensors do not fit the dtypes."""
    _check_fit(candidate, tolerances)
    for tensor, tolerance in zip(candidate.tensors, tolerances, strict=True):
        dtype = _FLOATS.get(tolerance.dtype)
        if dtype is not None and not np.logical_and.reduce(np.isfinite(np.frombuffer(tensor, dtype))):
            return False
    return True


def distance(x: Candidate, y: Candidate, tolerances: Sequence[Tolerance]) -> float:
    """Max over tensors and elements of |x - y| / epsilon, in float64; a metric, so symmetric and 0 on equality.

    Integers and bool count 0.0 if their bytes are equal, else inf; inf also where lengths differ. Both must be finite
    (`is_finite`). Raises MessageError if the tensors do not fit the dtypes.
    """
    for candidate in (x, y):
        _check_fit(candidate, tolerances)
    return 0.0 if x.tensors == y.tensors else _distances((x.tensors, y.tensors), tolerances)[0][1]


def stance(d: float) -> Stance:
    """The stance of an output at distance d from the accepted one."""
    if d <= AGREE:
        return Stance.AGREE
    return Stance.NEUTRAL if d <= NEUTRAL else Stance.DISSENT


def largest_clique(candidates: Sequence[Candidate], tolerances: Sequence[Tolerance]) -> Clique | None:
    """The largest clique of d <= 1; then the smallest diameter; then the lowest members by (digest, agent).

    The same for every order of the candidates; None if there are none. Raises MessageError for more than 16 candidates,
    two of one agent, tensors that do not fit the dtypes, or a non-finite output (callers drop those with `is_finite`).
    """
    _check_candidates(candidates, tolerances)
    if not candidates:
        return None
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].digest, candidates[i].agent))
    # From here on a candidate is its rank in this order, so a lower tuple of ranks is a lower member list.
    d = _ranked_distances([candidates[i] for i in order], tolerances)
    adjacent = [sum([1 << j for j, gap in enumerate(row) if gap <= AGREE and j != i]) for i, row in enumerate(d)]
    cliques = _maximal_cliques(adjacent)
    size = max([clique.bit_count() for clique in cliques])
    diameter, members, medoid = min([_measure(list(_bits(c)), d) for c in cliques if c.bit_count() == size])
    return Clique(tuple([order[i] for i in members]), diameter, order[medoid])


def accepted(clique: Clique, candidates: Sequence[Candidate]) -> tuple[bytes, ...]:
    """The accepted output: the medoid's tensors, bytes that one agent really signed."""
    return candidates[clique.medoid].tensors


def _check_candidates(candidates: Sequence[Candidate], tolerances: Sequence[Tolerance]) -> None:
    if len(candidates) > MAX_CANDIDATES:
        raise MessageError(f"a vote takes at most {MAX_CANDIDATES} candidates, got {len(candidates)}")
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.agent in seen:
            raise MessageError(f"agent {candidate.agent!a} has more than one candidate; a vote takes one an agent")
        seen.add(candidate.agent)
        # Identical NaN bytes would otherwise agree with each other at d = 0.
        if not is_finite(candidate, tolerances):
            raise MessageError(f"the output of agent {candidate.agent!a} is not finite; drop it before the vote")


def _check_fit(candidate: Candidate, tolerances: Sequence[Tolerance]) -> None:
    if len(candidate.tensors) != len(tolerances):
        raise MessageError(
            f"agent {candidate.agent!a}: expected {len(tolerances)} output tensors, got {len(candidate.tensors)}"
        )
    for k, (tensor, tolerance) in enumerate(zip(candidate.tensors, tolerances, strict=True)):
        if len(tensor) % ITEM_BYTES[tolerance.dtype]:
            raise MessageError(
                f"agent {candidate.agent!a}, output {k}: expected a multiple of {ITEM_BYTES[tolerance.dtype]} bytes"
                f" for {tolerance.dtype}, got {len(tensor)}"
            )


def _measure(members: list[int], d: list[list[float]]) -> tuple[float, list[int], int]:
    """Diameter, members, medoid of a clique of ranks: ordered as cliques of one size are preferred."""
    reach = [max([d[i][j] for j in members]) for i in members]
    return max(reach), members, members[reach.index(min(reach))]


def _ranked_distances(ranked: Sequence[Candidate], tolerances: Sequence[Tolerance]) -> list[list[float]]:
    """All pairs' distances. Equal bytes, the usual case, are compared by digest alone."""
    values = {candidate.digest: candidate.tensors for candidate in ranked}
    slot = {digest: i for i, digest in enumerate(values)}
    slots = [slot[candidate.digest] for candidate in ranked]
    table = _distances(list(values.values()), tolerances)
    return [[table[i][j] for j in slots] for i in slots]


def _distances(values: Sequence[tuple[bytes, ...]], tolerances: Sequence[Tolerance]) -> list[list[float]]:
    """Symmetric table of the distances between values."""
    table = [[0.0] * len(values) for _ in values]
    if len(values) < 2:
        return table
    for k, tolerance in enumerate(tolerances):
        column = [value[k] for value in values]
        dtype = _FLOATS.get(tolerance.dtype)
        gaps = _gaps(column, dtype) if dtype is not None and len(set(map(len, column))) == 1 else None
        for i, row in enumerate(table):
            for j in range(i):
                if gaps is not None:
                    d = _scaled(gaps[j][i], tolerance.epsilon)
                else:
                    d = 0.0 if column[i] == column[j] else math.inf
                row[j] = table[j][i] = max(row[j], d)
    return table


def _scaled(gap: float, epsilon: float) -> float:
    """Dividing the largest difference gives the same bits as the largest quotient: rounding is monotone."""
    if math.isnan(gap):
        return math.inf
    if epsilon == 0:
        return math.inf if gap else 0.0
    return gap / epsilon


def _gaps(column: Sequence[bytes], dtype: np.dtype) -> list[list[float]]:
    """Largest |x - y| of each pair i < j of equally long float tensors; float64, upper triangle."""
    views = [np.frombuffer(tensor, dtype) for tensor in column]
    gaps = np.zeros((len(views), len(views)))
    # A difference of float64 may overflow to inf, and inf is the right answer.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, views[0].size, _CHUNK):
            rows = np.array([view[start : start + _CHUNK] for view in views], dtype=np.float64)
            for i in range(len(views) - 1):
                gap = rows[i + 1 :] - rows[i]
                np.abs(gap, out=gap)
                np.maximum(gaps[i, i + 1 :], np.maximum.reduce(gap, axis=1), out=gaps[i, i + 1 :])
    return gaps.tolist()


def _bits(mask: int) -> Iterator[int]:
    """The positions of the bits set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _maximal_cliques(adjacent: Sequence[int]) -> list[int]:
    """Every maximal clique of a graph as a bitmask (Bron & Kerbosch 1973, pivot of Tomita et al. 2006).

    `adjacent[v]` is the bitmask of v's neighbours, without v.
    """
    found: list[int] = []

    def grow(clique: int, candidates: int, done: int) -> None:
        if not candidates | done:
            found.append(clique)
            return
        pivot = max(_bits(candidates | done), key=lambda v: (adjacent[v] & candidates).bit_count())
        for v in _bits(candidates & ~adjacent[pivot]):
            grow(clique | 1 << v, candidates & adjacent[v], done & adjacent[v])
            candidates &= ~(1 << v)
            done |= 1 << v

    grow(0, (1 << len(adjacent)) - 1, 0)
    return found
