"""Re-execution: a validator runs the expert itself, signs its own output, and names the outputs that it contradicts.

One job for all causes (spot check, a referee's or another validator's claim, a complaint, a suspect): whatever of a
verdict differs from our own value by more than twice the tolerance becomes the target of a signed claim.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.entries import Challenge, Claim, Confirmation, Verdict, parse_entry
from bmoe.ledger.rules.outputs import (
    Binding,
    candidate_of,
    check_specs,
    open_output,
    opening_of,
    parse_output,
    tolerances_of,
)
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.voting import NEUTRAL, Candidate, distance
from bmoe.ledger.store import Store
from bmoe.protocol.errors import InferenceError, LedgerError, MessageError, ModelError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import (
    MAX_TENSORS,
    Output,
    Release,
    Task,
    open_message,
    seal_header,
    tensor_specs,
    tensors_from,
)
from bmoe.protocol.tensors import Tensor

RUN_TIMEOUT_S = 60.0


class Gateway(Protocol):
    """What re-execution needs of the gateway's client."""

    async def evidence(self, task: bytes) -> bytes:
        """The kept input message of a task."""

    async def blob_file(self, digest: bytes, size: int, folder: Path) -> Path:
        """An expert's file, by its digest."""


@dataclass(frozen=True)
class Own:
    """Our own signed output for a task: envelope, the opening of its commitment, and the value."""

    envelope: bytes
    opening: bytes
    candidate: Candidate


@dataclass(frozen=True)
class Finding:
    """What a re-execution found: our output, and (author, envelope, opening) of each output that it contradicts."""

    own: Own
    targets: tuple[tuple[str, bytes, bytes], ...]


class Reexecutor:
    """Runs tasks again in the name of one validator. `fetch` gives an opening that the replica does not hold."""

    def __init__(
        self,
        name: str,
        signer: Signer,
        state: State,
        store: Store,
        gateway: Gateway,
        runner: Runner,
        folder: Path,
        fetch: Callable[[bytes], Awaitable[bytes]],
    ) -> None:
        self._name, self._signer, self._state, self._store = name, signer, state, store
        self._gateway, self._runner, self._folder, self._fetch = gateway, runner, folder, fetch

    def verdict_of(self, task: bytes) -> Verdict:
        """The verdict that stands for a task; raises LedgerError when there is none."""
        index = self._store.find("verdict", task)
        entry = parse_entry(self._store.leaf(index)) if index is not None else None
        if not isinstance(entry, Verdict):
            raise LedgerError(f"task {task.hex()} has no verdict in the replica")
        return entry

    async def examine(self, task: bytes, message: bytes | None = None) -> Finding:
        """Execute a task again and compare every output of its verdict, the referee's too, with our own value.

        `message` is the task message where we have it already. Raises UnavailableError, InputError, InferenceError.
        """
        verdict = self.verdict_of(task)
        release = self._state.releases[verdict.expert]
        data = message if message is not None else await self._gateway.evidence(task)
        inputs = read_inputs(data, verdict, release)
        path = await self._gateway.blob_file(verdict.expert, release.size, self._folder)
        try:
            result = await self._runner.run(ExpertFile(verdict.expert, path), inputs, timeout_s=RUN_TIMEOUT_S)
        except ModelError as error:
            path.unlink(missing_ok=True)  # damaged on disk, perhaps: fetched and checked anew at the next attempt
            raise InferenceError(f"expert {verdict.expert.hex()[:16]} cannot be loaded: {error}") from error
        own = self._sign(verdict, release, result.outputs, result.provider, result.duration_us)
        return Finding(own, await self._contradicted(verdict, release, own.candidate))

    def claim(self, task: bytes, finding: Finding) -> tuple[type[Claim], dict[str, Any], list[bytes]] | None:
        """The entry to make of a finding, with its attachments; None when nothing of it is still to be claimed."""

        def settled(target: str) -> bool:
            supporters = self._state.claims.get((task, target), set())
            return self._name in supporters or len(supporters) >= self._state.quorum

        fresh = [t for t in finding.targets if not settled(t[0])]
        if not fresh or task not in self._state.closed:
            return None
        known = all((task, target[0]) in self._state.claims for target in fresh)
        fields = {
            "task": task,
            "output": finding.own.envelope,
            "opening": hashlib.sha256(finding.own.opening).digest(),
            "targets": tuple(envelope for _, envelope, _ in fresh),
            "target_openings": tuple(hashlib.sha256(opening).digest() for _, _, opening in fresh),
        }
        return Confirmation if known else Challenge, fields, [finding.own.opening, *[o for _, _, o in fresh]]

    def _sign(
        self, verdict: Verdict, release: Release, tensors: tuple[Tensor, ...], provider: str, duration_us: int
    ) -> Own:
        salt = secrets.token_bytes(SALT_BYTES)
        header = Output(
            ledger=self._state.ledger,
            epoch=self._state.epoch,
            author=self._name,
            seq=self._store.next_output_seq(),
            task=verdict.task,
            expert=verdict.expert,
            input_root=verdict.input_root,
            rows=verdict.rows,
            outputs=tensor_specs(tensors),
            output_root=commit_rows(self._name, salt, tensors, verdict.rows),
            provider=provider,
            duration_us=duration_us,
        )
        candidate = candidate_of(header, tensors, release)
        if candidate is None:
            raise InferenceError(
                f"expert {verdict.expert.hex()[:16]} gives a value here that its release does not allow"
            )
        return Own(seal_header(self._signer, header), opening_of(salt, tensors), candidate)

    async def _contradicted(
        self, verdict: Verdict, release: Release, own: Candidate
    ) -> tuple[tuple[str, bytes, bytes], ...]:
        binding = Binding(verdict.task, verdict.expert, verdict.input_root, verdict.rows)
        tolerances = tolerances_of(release)
        envelopes = [*verdict.outputs, *([verdict.referee] if verdict.referee else [])]
        targets = []
        for envelope, digest in zip(envelopes, verdict.openings, strict=True):
            header = parse_output(envelope, binding).header
            opening = self._store.opening(digest) or await self._fetch(digest)
            theirs = candidate_of(header, open_output(header, opening), release)
            if theirs is None or distance(own, theirs, tolerances) > NEUTRAL:
                targets.append((header.author, envelope, opening))
        return tuple(targets)


def read_inputs(data: bytes, verdict: Verdict, release: Release) -> tuple[Tensor, ...]:
    """The input tensors in a task message, checked against the verdict's commitment and the release's declaration."""
    sealed = open_message(Task, data, MAX_TENSORS + 1)
    header, parts = sealed.header, sealed.parts
    if (header.task, header.expert, header.rows) != (verdict.task, verdict.expert, verdict.rows):
        raise MessageError(f"the evidence for task {verdict.task.hex()} is of another task")
    if not parts:
        raise MessageError(f"the evidence for task {verdict.task.hex()} carries no input")
    tensors = tensors_from(header.inputs, parts[1:])
    check_specs(tensors, release.inputs, verdict.rows if release.batch else None)
    if commit_rows("", parts[0], tensors, verdict.rows) != verdict.input_root:
        raise MessageError(f"the evidence for task {verdict.task.hex()} is not the input that its verdict commits to")
    return tensors
