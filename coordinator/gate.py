"""Gate: the gating network scores the experts for each row; the top k are activated with their weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.ledger.rules.combine import choose
from bmoe.ledger.rules.outputs import check_specs
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import BmoeError, InferenceError
from bmoe.protocol.messages import Release
from bmoe.protocol.tensors import Tensor, join_rows
from coordinator.jobs import Request

GATE_TIMEOUT_S = 5.0
ROWS_MAX = 256
FLOATS = ("float16", "float32", "float64")
# The model version by its manifest, its gate, and the dims behind axis 0: only rows alike can lie in one batch.
Key = tuple[bytes, bytes, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Routing:
    """For each row its experts (uint16 [rows, top_k]) and weights (float32 [rows, top_k]); rows by expert."""

    experts: np.ndarray
    weights: np.ndarray

    def rows_of(self, expert: int) -> list[int]:
        """The rows that activate an expert, ascending."""
        return np.flatnonzero((self.experts == expert).any(axis=1)).tolist()


@dataclass
class _Lane:
    """Requests that wait for one gate; whoever finds it idle runs it for all who wait."""

    waiting: list[tuple[Request, asyncio.Future[Routing]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Gate:
    """Runs gates in a killable process, so that a bad gate cannot stop the coordinator.

    Requests that come while a run is under way are scored together in the next.
    """

    def __init__(self, runner: Runner, blobs: Path) -> None:
        self._runner, self._blobs = runner, blobs
        self._lanes: dict[Key, _Lane] = {}

    async def score(self, request: Request) -> Routing:
        """Choose experts for every row; raises InferenceError when the gate fails or scores what cannot be."""
        model = request.model
        if model.gate is None:
            shape = (request.rows, 1)
            return Routing(np.zeros(shape, "<u2"), np.ones(shape, "<f4"))
        if model.gate.batch:
            return await self._shared(request, model.gate)
        scores = await self._run(model, model.gate, request.tensors, request.rows)
        return Routing(*choose(scores, model.statement.top_k))

    async def _shared(self, request: Request, gate: Release) -> Routing:
        key = (request.model.statement.manifest, gate.digest, tuple(t.dims[1:] for t in request.tensors))
        lane = self._lanes.setdefault(key, _Lane())
        done: asyncio.Future[Routing] = asyncio.get_running_loop().create_future()
        lane.waiting.append((request, done))
        if lane.task is None:
            lane.task = asyncio.create_task(self._serve(key, lane, gate))
        return await done

    async def _serve(self, key: Key, lane: _Lane, gate: Release) -> None:
        try:
            while lane.waiting:
                group = _take(lane.waiting)
                try:
                    await self._score_all(group, gate)
                except Exception as error:  # whatever it is, those who wait must hear of it, and the next be served
                    _fail(group, error)
        finally:
            _fail(lane.waiting, InferenceError("the gateway is stopping"))
            del self._lanes[key]

    async def _score_all(self, group: Sequence[tuple[Request, asyncio.Future[Routing]]], gate: Release) -> None:
        requests = [request for request, _ in group]
        model = requests[0].model
        rows = sum(r.rows for r in requests)
        inputs = requests[0].tensors
        if len(requests) > 1:
            inputs = tuple(join_rows([r.tensors[i] for r in requests]) for i in range(len(inputs)))
        try:
            scores = await self._run(model, gate, inputs, rows)
        except BmoeError:
            if len(group) == 1:
                raise
            for one in group:  # whose rows the gate cannot bear must not cost the others their answers
                try:
                    await self._score_all([one], gate)
                except BmoeError as error:
                    _fail([one], error)
            return
        experts, weights = choose(scores, model.statement.top_k)
        start = 0
        for request, done in group:
            mine = slice(start, start + request.rows)
            if not done.done():
                done.set_result(Routing(experts[mine], weights[mine]))
            start += request.rows

    async def _run(self, model: ReleasedModel, gate: Release, inputs: Sequence[Tensor], rows: int) -> np.ndarray:
        """Scores, float [rows, experts]. A gate may look at some of the model's inputs alone."""
        file = ExpertFile(gate.digest, self._blobs / gate.digest.hex())
        wanted = {spec[0] for spec in gate.inputs}
        result = await self._runner.run(file, [t for t in inputs if t.name in wanted], timeout_s=GATE_TIMEOUT_S)
        check_specs(result.outputs, gate.outputs, rows if gate.batch else None)
        given = next(t for t in result.outputs if t.dtype in FLOATS)  # the one that a manifest's gate has
        scores = np.frombuffer(given.data, np.dtype(given.dtype).newbyteorder("<")).reshape(rows, -1)
        if scores.shape[1] != len(model.experts) or not np.isfinite(scores).all() or (scores < 0).any():
            raise InferenceError(
                f"the gate of {model.name} gave scores {list(given.dims)} that are not finite weights, for each of {rows}"
                f" rows, of {len(model.experts)} experts"
            )
        return scores


def _take(
    waiting: list[tuple[Request, asyncio.Future[Routing]]],
) -> list[tuple[Request, asyncio.Future[Routing]]]:
    """The first of those who wait, as many as fit in one run, at least one."""
    rows, count = 0, 0
    for request, _ in waiting:
        rows += request.rows
        if count and rows > ROWS_MAX:
            break
        count += 1
    group = waiting[:count]
    del waiting[:count]
    return group


def _fail(group: Sequence[tuple[Request, asyncio.Future[Routing]]], error: Exception) -> None:
    for _, done in group:
        if not done.done():
            done.set_exception(error)
