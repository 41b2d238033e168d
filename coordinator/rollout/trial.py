"""A trial: what the new version answers to a request that the version in use has answered, compared, told to nobody."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import structlog

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.protocol.tensors import Tensor, take_rows
from coordinator.jobs import Answered, Request
from coordinator.rollout.course import Course

log = structlog.get_logger("rollout")
# Requests tried on the new version as well while the canaries are watched.
PER_S = 8.0
AT_ONCE = 4
TENANT = "rollout"
ROWS_MAX = 8
# Outputs of numbers differ when they are further apart than this share of the larger one.
RELATIVE = 0.1


class Trials:
    """`trial(request)` has a request answered for nobody."""

    def __init__(
        self,
        trial: Callable[[Request], Awaitable[Sequence[Tensor]]],
        spawn: Callable[[Awaitable[None]], object],
    ) -> None:
        self._trial, self._spawn = trial, spawn

    def begin(self, answered: Answered, model: ReleasedModel, course: Course) -> None:
        """Try an answered request on the new version too, unless enough are being tried."""
        now = time.monotonic()
        if course.trials < AT_ONCE and now - course.tried >= 1 / PER_S:
            course.tried = now
            self._spawn(self._try(answered, model, course))

    async def _try(self, answered: Answered, model: ReleasedModel, course: Course) -> None:
        course.trials += 1
        watch = course.watch  # of the stage in which it was begun
        rows = min(answered.request.rows, ROWS_MAX)
        try:
            request = trial_request(answered, model)
            found = await self._trial(request)
            watch.answered()
            if comparable(answered.request.model, model):
                watch.compared(request.rows, differing(answered.result.tensors, found, request.rows))
        except UnavailableError as error:  # the watch has seen the task that failed
            log.info("trial_failed", model=model.name, version=model.statement.version, error=str(error))
        except BmoeError as error:  # its gate fails, or it does not take what the version in use takes
            log.info("trial_failed", model=model.name, version=model.statement.version, error=str(error))
            watch.answered()
            watch.compared(rows, rows)
        finally:
            course.trials -= 1


def trial_request(answered: Answered, model: ReleasedModel) -> Request:
    """The first rows of an answered request, for the new version."""
    request = answered.request
    rows = min(request.rows, ROWS_MAX) if request.model.batch else request.rows
    tensors = request.tensors
    if rows < request.rows:
        tensors = tuple(take_rows(tensor, list(range(rows))) for tensor in tensors)
    return replace(request, model=model, tensors=tensors, rows=rows, tenant=TENANT)


def comparable(old: ReleasedModel, new: ReleasedModel) -> bool:
    """Whether both versions give tensors of the same names, types and shapes."""

    def shape(model: ReleasedModel) -> object:
        expert = model.experts[0]
        return expert.batch, [output[:3] for output in expert.outputs]

    return shape(old) == shape(new)


def differing(mine: Sequence[Tensor], other: Sequence[Tensor], rows: int) -> int:
    """In how many of the first `rows` rows two answers differ: in the place of the largest value, where a row is a
    vector of scores; in a number by more than a tenth; in anything else at all."""
    wrong = np.zeros(rows, bool)
    for a, b in zip(mine, other, strict=True):
        left, right = (np.frombuffer(t.data, t.dtype).reshape(t.dims) for t in (a, b))
        if left.ndim == 0 or left.shape[0] < rows or right.shape[0] < rows:
            left, right = left.reshape(1, -1), right.reshape(1, -1)
        count = min(rows, left.shape[0], right.shape[0])
        wrong[:count] |= _differ(left[:count].reshape(count, -1), right[:count].reshape(count, -1))
    return int(wrong.sum())


def _differ(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if left.shape != right.shape:
        return np.ones(len(left), bool)
    if left.dtype.kind != "f":
        return np.asarray((left != right).any(axis=1))
    if left.shape[1] > 1:
        return np.asarray(left.argmax(axis=1) != right.argmax(axis=1)) | ~np.isfinite(right).all(axis=1)
    scale = np.maximum(np.abs(left), np.abs(right))
    return np.asarray((~(np.abs(left - right) <= RELATIVE * scale + 1e-6)).any(axis=1))
