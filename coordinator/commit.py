"""Commit: verdicts and answers become ledger entries, with the openings that let anyone recompute them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.combine import Choices
from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.entries import (
    MAX_LEAF_BYTES,
    MAX_OUTPUTS,
    NOBODY,
    Answer,
    Entry,
    Equivocation,
    Opened,
    Rollout,
    Verdict,
)
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.outputs import opening_of
from bmoe.ledger.rules.policies import Decision, policy_named
from bmoe.protocol.messages import tensor_specs
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.text import plain
from bmoe.storage.evidence import EvidenceStore
from coordinator.collect import Collection
from coordinator.jobs import Accepted, Job, Request, Result
from coordinator.journal import Journal

# Of an answer's leaf, kept for everything but the choices: up to 80 tasks with their openings, specs, roots.
REST_OF_ANSWER = 5 * 1024


class Committer:
    """Enters what the coordinator decides. Futures complete when the ledger engine has the entry on disk."""

    def __init__(self, author: FrameAuthor, evidence: EvidenceStore, journal: Journal) -> None:
        self._author, self._evidence, self._journal = author, evidence, journal
        self._opening: list[tuple[bytes, bytes, int]] = []
        self._opened: asyncio.Future[int] | None = None

    async def opened(self, job: Job) -> None:
        """Make the open slot visible before anything is dispatched. Jobs opened together share one entry."""
        self._opening.append((job.task, job.expert.digest, job.binding.rows))
        if self._opened is None:
            self._opened = asyncio.ensure_future(self._open())
        await asyncio.shield(self._opened)

    async def _open(self) -> int:
        await asyncio.sleep(0)
        tasks, self._opening, self._opened = self._opening, [], None
        groups = [tuple(tasks[i : i + 256]) for i in range(0, len(tasks), 256)]
        return await self._author.enter(*[(Opened, {"tasks": group}) for group in groups])

    async def rollout(self, fields: dict[str, Any]) -> int:
        """Enter where a rollout stands; the position of its frame."""
        return await self._author.enter((Rollout, fields))

    async def keep_input(self, task: bytes, message: bytes) -> None:
        """Keep a task's input where validators can fetch it."""
        await self._evidence.keep([(task, message)])

    async def keep_evidence(self, digest: bytes, message: bytes) -> None:
        """Keep a signed message by its digest, whatever it proves."""
        await self._evidence.keep([(digest, message)])

    async def verdict(
        self, job: Job, collection: Collection, decision: Decision, as_of: int, reason: str
    ) -> asyncio.Future[int]:
        """Queue a verdict, its large openings kept; the future gives the position of its frame."""
        received = list(collection.received.values())[:MAX_OUTPUTS]
        referee = collection.referee
        openings = [r.opening for r in (*received, *([referee] if referee else []))]
        fields: dict[str, Any] = {
            "task": job.task,
            "model": job.model,
            "expert": job.expert.digest,
            "rows": job.binding.rows,
            "input_root": job.binding.input_root,
            "policy": collection.policy.name,
            "policy_version": collection.policy.version,
            "assigned": tuple(collection.assigned),
            "outputs": tuple(r.envelope for r in received),
            "referee": referee.envelope if referee else b"",
            "openings": tuple(hashlib.sha256(o).digest() for o in openings),
            "as_of": as_of,
            "outcome": "accepted" if decision.accepted != NOBODY else "undecided",
            "accepted": decision.accepted,
            "stances": decision.stances,
            "reason": plain(reason),
            "tenant": job.tenant,
        }
        await self._keep_large(openings)
        entering = self._author.submit([(Verdict, fields)], openings, urgent=False)
        self._journal.deciding(job.task, fields, openings, entering)
        return entering

    async def abandon(
        self,
        task: bytes,
        expert: bytes,
        rows: int,
        as_of: int,
        reason: str = "the coordinator restarted before a verdict",
    ) -> int:
        """Close a slot that stays without verdict, such as one that an earlier run of this coordinator left open."""
        policy = policy_named("referee")
        fields = {
            "task": task, "model": "unknown", "expert": expert, "rows": rows, "input_root": bytes(32),
            "policy": policy.name, "policy_version": policy.version, "assigned": (), "outputs": (), "referee": b"",
            "openings": (), "as_of": as_of, "outcome": "abandoned", "accepted": NOBODY, "stances": "",
            "reason": reason[:200], "tenant": "unknown",
        }  # fmt: skip
        return await self._author.enter((Verdict, fields))

    async def answer(
        self, request: Request, choices: Choices, tasks: Sequence[Accepted], result: Result
    ) -> asyncio.Future[int]:
        """Queue an answer behind its verdicts, which must stand before it; the future gives the position of its frame."""
        openings = [a.opening for a in tasks]
        own = opening_of(result.salt, result.tensors)
        fields = {
            "request": request.id,
            "model": request.model.name,
            "version": request.model.statement.version,
            "gate": request.model.statement.gate,
            "request_root": result.request_root,
            "rows": request.rows,
            "top_k": choices.experts.shape[1],
            "experts": choices.experts.astype("<u2").tobytes(),
            "weights": choices.weights.astype("<f4").tobytes(),
            "tasks": tuple(a.task for a in tasks),
            "task_index": choices.task_index.astype("<u2").tobytes(),
            "task_rows": choices.task_rows.astype("<u2").tobytes(),
            "openings": tuple(hashlib.sha256(o).digest() for o in openings),
            "outputs": tensor_specs(result.tensors),
            "result_root": result.root,
            "result_opening": hashlib.sha256(own).digest(),
            "tenant": request.tenant,
        }
        await self._keep_large([*openings, own])
        entering = self._author.submit(
            [(Answer, fields)],
            [*openings, own],
            after=[a.entered for a in tasks if a.entered is not None],
            urgent=request.wait != "decided",
        )
        self._journal.answering(request.id, fields, [*openings, own], entering)
        return entering

    def again(self, kind: type[Entry], fields: dict[str, Any], openings: Sequence[bytes]) -> asyncio.Future[int]:
        """Queue an entry of an earlier run that may not have got to the ledger."""
        return self._author.submit([(kind, fields)], openings)

    async def equivocation(self, first: bytes, second: bytes) -> int:
        """Enter two different signed outputs of one agent for one task."""
        return await self._author.enter((Equivocation, {"first": first, "second": second}))

    async def _keep_large(self, openings: Sequence[bytes]) -> None:
        large = [(hashlib.sha256(o).digest(), o) for o in openings if len(o) > INLINE_BYTES]
        if large:
            await self._evidence.keep(large)


def answer_rows_max(top_k: int) -> int:
    """How many rows an answer can have: its packed choices, 10 bytes each, must fit a leaf beside the rest of the entry."""
    return max(1, (MAX_LEAF_BYTES - REST_OF_ANSWER) // (10 * top_k))


def commit_result(request: Request, tensors: tuple[Tensor, ...]) -> Result:
    """Salted commitments to a request and its result; the client is given both salts."""
    salt, rows = os.urandom(SALT_BYTES), request.rows
    return Result(
        tensors,
        salt,
        commit_rows("", salt, tensors, rows),
        commit_rows("", request.salt, request.tensors, rows),
        request.salt,
    )
