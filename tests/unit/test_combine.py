"""Combination: the gate's weights applied in one order, against a slow twin with loops; and what is refused."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.ledger.rules.combine import Choices, choose, combine, unpack_choices
from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor

RULE = "weighted_sum"


def _tensor(array: np.ndarray, name: str = "y") -> Tensor:
    return Tensor(name, array.dtype.name, array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes())


def _array(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.dims)


def _choices(weights: list[list[float]], index: list[list[int]], rows: list[list[int]]) -> Choices:
    return Choices(np.array(index, "<u2"), np.array(weights, "<f4"), np.array(index, "<u2"), np.array(rows, "<u2"))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Choices, list[np.ndarray]]:
    """Some rows over some tasks of different sizes, every task named at least once."""
    rows, top_k, width = draw(st.integers(1, 5)), draw(st.integers(2, 3)), draw(st.integers(1, 4))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    tasks = [chance.normal(0, 100, (int(chance.integers(1, 6)), width)).astype("<f4") for _ in range(top_k)]
    index = np.array([chance.permutation(top_k) for _ in range(rows)], "<u2")
    where = np.array([[chance.integers(len(tasks[t])) for t in row] for row in index], "<u2")
    weights = chance.dirichlet(np.ones(top_k), rows).astype("<f4")
    return Choices(index, weights, index, where), tasks


@given(cases())
def test_the_fast_sum_is_the_slow_twins_bit_for_bit(case: tuple[Choices, list[np.ndarray]]) -> None:
    choices, tasks = case
    (fast,) = combine(RULE, choices, [(_tensor(t),) for t in tasks], True)
    for row, values in enumerate(_array(fast)):
        for column, value in enumerate(values):
            slow, exact = 0.0, Fraction(0)
            for k in range(choices.experts.shape[1]):
                weight = float(choices.weights[row, k])
                item = float(tasks[choices.task_index[row, k]][choices.task_rows[row, k], column])
                slow += weight * item
                exact += Fraction(weight) * Fraction(item)
            assert struct.pack("<f", slow) == struct.pack("<f", value)
            assert abs(Fraction(float(value)) - exact) <= Fraction(1, 10**4), "and near the exact sum"


@given(cases())
def test_a_row_does_not_depend_on_its_neighbours(case: tuple[Choices, list[np.ndarray]]) -> None:
    choices, tasks = case
    outputs = [(_tensor(t),) for t in tasks]
    (whole,) = combine(RULE, choices, outputs, True)
    for row in range(choices.experts.shape[0]):
        one = Choices(*(a[row : row + 1] for a in (choices.experts, choices.weights, choices.task_index,
                                                   choices.task_rows)))  # fmt: skip
        assert combine(RULE, one, outputs, True)[0].data == whole.row(row)


def test_the_best_expert_alone_gives_its_very_bytes_of_any_dtype() -> None:
    parts = [np.array([[1], [2]], "<i8"), np.array([[3], [4], [5]], "<i8")]
    choices = _choices([[1], [1], [1]], [[1], [0], [1]], [[2], [1], [0]])
    (result,) = combine(RULE, choices, [(_tensor(p),) for p in parts], True)
    assert _array(result).tolist() == [[5], [2], [3]] and result.dtype == "int64"


def test_without_a_batch_axis_whole_tensors_are_weighed() -> None:
    parts = [np.array([1, 2, 3], "<f4"), np.array([3, 2, 1], "<f4")]
    outputs = [(_tensor(p),) for p in parts]
    (half,) = combine(RULE, _choices([[0.25, 0.75]], [[0, 1]], [[0, 0]]), outputs, False)
    assert _array(half).tolist() == [2.5, 2.0, 1.5] and half.dims == (3,)
    (one,) = combine(RULE, _choices([[1]], [[0]], [[0]]), outputs[:1], False)
    assert one == outputs[0][0]
    scalar = (_tensor(np.array(7.5, "<f8")),)
    assert combine(RULE, _choices([[1]], [[0]], [[0]]), [scalar], False) == scalar


Y = np.ones((2, 3), "<f4")
FAULTS = {
    "a strange rule": ("mean", _choices([[1]], [[0]], [[0]]), [Y], True),
    "a row outside its task": (RULE, _choices([[1]], [[0]], [[2]]), [Y], True),
    "a task outside": (RULE, _choices([[1]], [[1]], [[0]]), [Y], True),
    "a task that nobody names": (RULE, _choices([[1]], [[1]], [[0]]), [Y, Y], True),
    "no task": (RULE, _choices([[1]], [[0]], [[0]]), [], True),
    "integers weighed": (RULE, _choices([[0.5, 0.5]], [[0, 1]], [[0, 0]]), [Y.astype("<i4")] * 2, True),
    "two widths": (RULE, _choices([[0.5, 0.5]], [[0, 1]], [[0, 0]]), [Y, Y[:, :2]], True),
    "two dtypes": (RULE, _choices([[1], [1]], [[0], [1]], [[0], [0]]), [Y.view("<i4"), Y], True),
    "two shapes of equal size": (RULE, _choices([[1], [1]], [[0], [1]], [[0], [0]]), [Y, Y.reshape(2, 3, 1)], True),
    "no row axis": (RULE, _choices([[1]], [[0]], [[0]]), [np.array(1, "<f4")], True),
    "two rows without a row axis": (RULE, _choices([[1], [1]], [[0], [0]], [[0], [0]]), [Y], False),
    "a row within an unbatched tensor": (RULE, _choices([[1]], [[0]], [[1]]), [Y], False),
}


@pytest.mark.parametrize("story", FAULTS)
def test_what_does_not_follow_from_its_tasks_is_refused(story: str) -> None:
    rule, choices, parts, batch = FAULTS[story]
    with pytest.raises(MessageError):
        combine(rule, choices, [(_tensor(p),) for p in parts], batch)


def test_a_strange_task_cannot_lend_its_value_to_an_unbatched_answer() -> None:
    """A coordinator lists somebody else's task first, hoping that the first one's value is taken."""
    strange, own = (_tensor(np.array([v], "<f4")) for v in (666.0, 1.0))
    with pytest.raises(MessageError, match="name each of the 2 tasks"):
        combine(RULE, _choices([[1]], [[1]], [[0]]), [(strange,), (own,)], False)


def test_tasks_with_different_counts_or_names_of_tensors_are_refused() -> None:
    choices = _choices([[0.5, 0.5]], [[0, 1]], [[0, 0]])
    with pytest.raises(MessageError, match="differ in how many tensors"):
        combine(RULE, choices, [(_tensor(Y),), (_tensor(Y), _tensor(Y, "z"))], True)
    with pytest.raises(MessageError, match="differ in name, dtype or dims"):
        combine(RULE, choices, [(_tensor(Y),), (_tensor(Y, "z"),)], True)


def _packed(weights: list[float], rows: int = 1) -> tuple[bytes, bytes, bytes, bytes]:
    count = len(weights)
    zero = np.zeros(count, "<u2").tobytes()
    return zero, np.array(weights, "<f4").tobytes(), zero, zero


@pytest.mark.parametrize(
    "weights",
    [[0.5, 0.6], [0.5, 0.4], [1.5, -0.5], [float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0], [1.0, 1e-4]],
)
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(MessageError, match="finite, not negative, and sum to 1"):
        unpack_choices(1, 2, *_packed(weights))
    assert unpack_choices(1, 2, *_packed([0.25, 0.75])).weights.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("field", range(4))
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\x00", lambda b: b""])
def test_fields_of_another_length_are_refused(field: int, change: object) -> None:
    fields = list(_packed([1.0]))
    fields[field] = change(fields[field])  # type: ignore[operator]
    with pytest.raises(MessageError, match="do not hold 1 rows of 1"):
        unpack_choices(1, 1, *fields)


def test_ties_go_to_the_lower_index() -> None:
    experts, weights = choose(np.array([[1, 3, 3, 3], [0, 0, 0, 0], [2, 2, 1, 2]], np.float32), 2)
    assert experts.tolist() == [[1, 2], [0, 1], [0, 1]] and weights.tolist() == [[0.5, 0.5]] * 3
    assert (experts.dtype.str, weights.dtype.str) == ("<u2", "<f4")


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32))
def test_what_is_chosen_is_what_a_sort_by_hand_chooses(top_k: int, experts: int, seed: int) -> None:
    top_k = min(top_k, experts)
    scores = np.random.default_rng(seed).dirichlet(np.ones(experts), 3).astype("<f4")
    chosen, weights = choose(scores, top_k)
    for row, score in enumerate(scores.tolist()):
        expected = sorted(range(experts), key=lambda e: (-score[e], e))[:top_k]
        assert chosen[row].tolist() == expected
        assert weights[row].tolist() == pytest.approx([score[e] / sum(score[x] for x in expected) for e in expected])
    empty = np.zeros((3, top_k), "<u2").tobytes()
    unpack_choices(3, top_k, chosen.tobytes(), weights.tobytes(), empty, empty)


def test_the_extremes_of_float32_stay_finite() -> None:
    big = np.finfo("<f4").max
    for signs in itertools.product([1, -1], repeat=2):
        parts = [np.full((1, 1), s * big, "<f4") for s in signs]
        (result,) = combine(RULE, _choices([[0.5, 0.5]], [[0, 1]], [[0, 0]]), [(_tensor(p),) for p in parts], True)
        assert np.isfinite(_array(result)).all()
