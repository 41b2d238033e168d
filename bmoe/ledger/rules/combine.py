"""How a request's expert outputs become its answer: the gate's weights, applied in one fixed order.

Sums run in float64 over the choices in order, elementwise, then round once to the output's dtype: correctly rounded
IEEE operations only, so that every validator gets the same bytes. No matrix product decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor

WEIGHT_SLACK = 1e-5


@dataclass(frozen=True)
class Choices:
    """The gate's choice for each row: int arrays [rows, top_k] and float32 weights [rows, top_k]."""

    experts: np.ndarray
    weights: np.ndarray
    task_index: np.ndarray
    task_rows: np.ndarray


def choose(scores: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The top_k experts of each row by score (ties: lower index) and their weights, renormalised to sum 1.

    scores: float [rows, experts]. Returns uint16 [rows, top_k] and float32 [rows, top_k].
    """
    exact = scores.astype(np.float64)
    order = (-exact).argsort(axis=1, kind="stable")[:, :top_k]
    chosen = exact[np.arange(len(exact))[:, None], order]
    total = chosen.sum(axis=1, keepdims=True)
    even = np.full_like(chosen, 1.0 / top_k)
    weights = np.divide(chosen, total, out=even, where=total > 0)
    return order.astype("<u2"), weights.astype("<f4")


def unpack_choices(
    rows: int, top_k: int, experts: bytes, weights: bytes, task_index: bytes, task_rows: bytes
) -> Choices:
    """Choices from an answer entry's packed fields; raises MessageError for lengths or weights that cannot be."""
    count = rows * top_k
    if (len(experts), len(weights), len(task_index), len(task_rows)) != (2 * count, 4 * count, 2 * count, 2 * count):
        raise MessageError(f"packed choices do not hold {rows} rows of {top_k}")
    shape = (rows, top_k)
    values = np.frombuffer(weights, "<f4").reshape(shape)
    total = values.astype(np.float64).sum(axis=1)
    if not np.isfinite(values).all() or (values < 0).any() or (abs(total - 1) > WEIGHT_SLACK).any():
        raise MessageError("the weights of each row must be finite, not negative, and sum to 1")
    return Choices(
        np.frombuffer(experts, "<u2").reshape(shape),
        values,
        np.frombuffer(task_index, "<u2").reshape(shape),
        np.frombuffer(task_rows, "<u2").reshape(shape),
    )


def combine(rule: str, choices: Choices, outputs: Sequence[Sequence[Tensor]], batch: bool) -> tuple[Tensor, ...]:
    """The answer's tensors from the accepted outputs of its tasks (outputs[task][tensor])."""
    if rule != "weighted_sum":
        raise MessageError(f"combine rule {rule!a} is not known here")
    # A task that no choice names could lend its names and types to an answer that its expert has no part in.
    if not outputs or set(choices.task_index.ravel().tolist()) != set(range(len(outputs))):
        raise MessageError(f"the choices must name each of the {len(outputs)} tasks, and no other")
    if any(len(o) != len(outputs[0]) for o in outputs):
        raise MessageError(f"the tasks differ in how many tensors they hold: {[len(o) for o in outputs]}")
    return tuple(_weighted(choices, [o[i] for o in outputs], batch) for i in range(len(outputs[0])))


def _weighted(choices: Choices, parts: Sequence[Tensor], batch: bool) -> Tensor:
    """One tensor of the answer. Without a batch axis the whole tensor is the one row."""
    first = parts[0]
    dtype = np.dtype(first.dtype).newbyteorder("<")
    rows, top_k = choices.experts.shape
    if top_k > 1 and dtype.kind != "f":
        raise MessageError(f"outputs of {first.dtype} cannot be summed with weights")
    _check_alike(parts, batch, rows)
    arrays = [np.frombuffer(p.data, dtype).reshape(p.dims if batch else (1, *p.dims)) for p in parts]
    sizes = [len(a) for a in arrays]
    if (choices.task_rows >= np.array(sizes)[choices.task_index]).any():
        raise MessageError("a choice points outside its tasks")
    offsets = np.array([0, *accumulate(sizes[:-1])])
    stacked = np.concatenate(arrays)
    where = offsets[choices.task_index] + choices.task_rows
    if top_k == 1:
        result = stacked[where[:, 0]]
    else:
        total = np.zeros((rows, *stacked.shape[1:]), np.float64)
        weights = choices.weights.astype(np.float64).reshape(rows, top_k, *([1] * (stacked.ndim - 1)))
        for k in range(top_k):
            total += weights[:, k] * stacked[where[:, k]]  # float64 times a narrower float: widened first, exactly
        result = total.astype(dtype)
    return Tensor(first.name, first.dtype, tuple(result.shape[0 if batch else 1 :]), result.tobytes())


def _check_alike(parts: Sequence[Tensor], batch: bool, rows: int) -> None:
    if any(not p.dims for p in parts) if batch else rows != 1:
        raise MessageError("without a batch axis an answer has one row, with one every tensor has axis 0")
    alike = {(p.name, p.dtype, tuple(p.dims[1 if batch else 0 :])) for p in parts}
    if len(alike) > 1:
        raise MessageError(f"outputs that differ in name, dtype or dims cannot be combined: {sorted(alike)[:4]}")
