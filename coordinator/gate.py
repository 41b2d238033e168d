"""Gate: the gating network scores the experts for each row; the top k are activated with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.ledger.rules.combine import choose
from bmoe.ledger.rules.outputs import check_specs
from bmoe.protocol.errors import InferenceError
from coordinator.jobs import Request

GATE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Routing:
    """For each row its experts (uint16 [rows, top_k]) and weights (float32 [rows, top_k]); rows by expert."""

    experts: np.ndarray
    weights: np.ndarray

    def rows_of(self, expert: int) -> list[int]:
        """The rows that activate an expert, ascending."""
        return np.flatnonzero((self.experts == expert).any(axis=1)).tolist()


class Gate:
    """Runs gates in a killable process, so that a bad gate cannot stop the coordinator."""

    def __init__(self, runner: Runner, blobs: Path) -> None:
        self._runner, self._blobs = runner, blobs

    async def score(self, request: Request) -> Routing:
        """Choose experts for every row; raises InferenceError when the gate fails or scores what cannot be."""
        model = request.model
        if model.gate is None:
            shape = (request.rows, 1)
            return Routing(np.zeros(shape, "<u2"), np.ones(shape, "<f4"))
        file = ExpertFile(model.gate.digest, self._blobs / model.gate.digest.hex())
        result = await self._runner.run(file, request.tensors, timeout_s=GATE_TIMEOUT_S)
        check_specs(result.outputs, model.gate.outputs, request.rows)
        scores = np.frombuffer(result.outputs[0].data, "<f4").reshape(request.rows, -1)
        if scores.shape[1] != len(model.experts) or not np.isfinite(scores).all() or (scores < 0).any():
            raise InferenceError(f"the gate of {model.name} gave scores that are not finite weights for its experts")
        return Routing(*choose(scores, model.statement.top_k))
