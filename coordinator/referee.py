"""The referee: the coordinator re-executes a task with the same expert digest and signs its output like an agent."""

from __future__ import annotations

import os
from pathlib import Path

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.outputs import Binding, candidate_of, opening_of
from bmoe.protocol.errors import InferenceError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Output, Release, seal_header, tensor_specs
from bmoe.protocol.tensors import Tensor
from coordinator.collect import Received
from coordinator.jobs import Counter


class Referee:
    """Runs experts in a killable process of its own."""

    def __init__(self, runner: Runner, blobs: Path, signer: Signer, author: str, ledger: bytes, epoch: int) -> None:
        self._runner, self._blobs, self._signer = runner, blobs, signer
        self._author, self._ledger, self._epoch = author, ledger, epoch
        self._counter = Counter()
        self.executions = 0

    async def execute(
        self, binding: Binding, release: Release, inputs: tuple[Tensor, ...], timeout_s: float
    ) -> Received:
        """Our own signed output for a task; raises InferenceError when the expert fails here too."""
        file = ExpertFile(release.digest, self._blobs / release.digest.hex())
        self.executions += 1
        result = await self._runner.run(file, inputs, timeout_s=timeout_s)
        salt = os.urandom(SALT_BYTES)
        header = Output(
            ledger=self._ledger,
            epoch=self._epoch,
            author=self._author,
            seq=self._counter.next(),
            task=binding.task,
            expert=binding.expert,
            input_root=binding.input_root,
            rows=binding.rows,
            outputs=tensor_specs(result.outputs),
            output_root=commit_rows(self._author, salt, result.outputs, binding.rows),
            provider=result.provider,
            duration_us=result.duration_us,
        )
        candidate = candidate_of(header, result.outputs, release)
        if candidate is None:
            raise InferenceError(f"expert {release.expert_name} gave a value that its release does not allow")
        opening = opening_of(salt, result.outputs)
        envelope = seal_header(self._signer, header)
        return Received(self._author, envelope, opening, header.output_root, tuple(result.outputs), candidate)
