"""A local answer: gate and experts run on this board alone, for the time when the gateway cannot be asked.

Nobody checks it, so it is marked as unverified; the same request is verified later. See submissions.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmoe.inference.runner import Runner
from bmoe.ledger.rules.combine import Choices, choose, combine
from bmoe.ledger.rules.outputs import check_specs, tolerances_of
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.voting import NEUTRAL, Candidate, distance
from bmoe.protocol.errors import BmoeError, InferenceError, UnavailableError
from bmoe.protocol.messages import Release
from bmoe.protocol.tensors import Tensor, take_rows
from edge_agent.experts import Experts

FLOATS = ("float16", "float32", "float64")
RUN_S = 30.0


class Local:
    """Answers for models whose gate and experts are all on this board's disk."""

    def __init__(self, experts: Experts, runner: Runner) -> None:
        self._experts, self._runner = experts, runner
        self._held: set[tuple[bytes, ...]] = set()

    async def hold(self, model: ReleasedModel) -> None:
        """Fetch what is missing of a model, and be ready to run it; raises as `Experts.get` and `Runner.start` do."""
        for release in _parts(model):
            await self._experts.get(release.digest)
        await self._runner.start()
        self._held.add(_key(model))

    async def answer(self, model: ReleasedModel, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The model's outputs. Raises UnavailableError if the board does not hold all of it, and what the runner raises."""
        if _key(model) not in self._held:
            raise UnavailableError(f"this board does not hold all of model {model.statement.model} yet")
        rows = tensors[0].dims[0] if model.batch else 1
        chosen, weights = await self._choose(model, tensors, rows)
        outputs: list[tuple[Tensor, ...]] = []
        index, places = np.zeros_like(chosen), np.zeros_like(chosen)
        for expert in sorted(set(chosen.reshape(-1).tolist())):
            mine = np.flatnonzero((chosen == expert).any(axis=1)) if model.batch else np.arange(1)
            inputs = [take_rows(t, mine.tolist()) for t in tensors] if model.batch else list(tensors)
            for place, row in enumerate(mine.tolist()):
                index[row, chosen[row] == expert] = len(outputs)
                places[row, chosen[row] == expert] = place
            outputs.append(await self._run(model.experts[expert], inputs, len(mine)))
        return combine(model.statement.combine, Choices(chosen, weights, index, places), outputs, model.batch)

    async def _choose(
        self, model: ReleasedModel, tensors: Sequence[Tensor], rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if model.gate is None:
            return np.zeros((rows, 1), "<u2"), np.ones((rows, 1), "<f4")
        wanted = {spec[0] for spec in model.gate.inputs}  # a gate may look at some of the inputs alone
        outputs = await self._run(model.gate, [t for t in tensors if t.name in wanted], rows)
        given = next(t for t in outputs if t.dtype in FLOATS)  # beside it there may be a label
        scores = np.frombuffer(given.data, np.dtype(given.dtype).newbyteorder("<")).reshape(rows, -1)
        if scores.shape[1] != len(model.experts) or not np.isfinite(scores).all() or (scores < 0).any():
            raise InferenceError(f"the gate of {model.statement.model} gave scores that are no weights for its experts")
        return choose(scores, model.statement.top_k)

    async def _run(self, release: Release, inputs: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
        served = await self._experts.get(release.digest)
        result = await self._runner.run(served.file, inputs, timeout_s=RUN_S)
        check_specs(result.outputs, release.outputs, rows if release.batch else None)
        return result.outputs


def differs(model: ReleasedModel, local: Sequence[Tensor], verified: Sequence[Tensor]) -> bool:
    """Whether a verified answer is another than the local one: further off than two honest boards can be.

    The tolerance of an output is the largest that any expert declares for it; d > 2 tells, as in a verdict.
    """
    ours, theirs = {t.name: t for t in local}, {t.name: t for t in verified}
    if not theirs or not set(theirs) <= set(ours):
        return True
    each = [tolerances_of(release) for release in model.experts]
    for i, (name, *_) in enumerate(model.experts[0].outputs):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:  # the client asked for some outputs only
            continue
        if (a.dtype, a.dims) != (b.dtype, b.dims):
            return True
        loosest = max((tolerances[i] for tolerances in each), key=lambda tolerance: tolerance.epsilon)
        try:
            d = distance(Candidate("local", (a.data,)), Candidate("verified", (b.data,)), [loosest])
        except BmoeError:
            return True
        if d > NEUTRAL:
            return True
    return False


def _parts(model: ReleasedModel) -> list[Release]:
    return [*model.experts, *([model.gate] if model.gate else [])]


def _key(model: ReleasedModel) -> tuple[bytes, ...]:
    return tuple(release.digest for release in _parts(model))
