"""Re-reads the whole ledger as any reader may, recomputes everything on it, and says what stands there.

Raises AssertionError for whatever must never be: a frame out of its author's chain, a rejected entry, a fenced author,
a task judged twice, a request answered twice, a root that validators cosigned and that is not our own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nats.js.errors import NotFoundError

from bmoe import client
from bmoe.ledger.rules.checkpoint import parse_checkpoint, parse_note, verify_cosignature
from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import Answer, Entry, Equivocation, Opened, Verdict, parse_entry
from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.frames import NO_FRAME, parse_frame
from bmoe.ledger.rules.merkle import Frontier, leaf_hash
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Trust
from bmoe.ledger.stream import CHECKPOINTS, LedgerAccess, LedgerStream, StreamMessage
from bmoe.protocol.messages import Output, open_message
from bmoe.protocol.tensors import Tensor
from coordinator.embedded.ports import read_ports
from coordinator.state_layout import StateLayout

READER = "coordinator"  # whose certificate we come with


@dataclass
class LedgerFacts:
    """What one reading found: `opened` (rows) and `verdicts` by task id, `answers` by request id, `chains` (sequence,
    digest) of each author's last frame, `roots` of our own tree by size at each tick, `cosigned` roots by size."""

    state: State
    height: int = 0
    opened: dict[bytes, int] = field(default_factory=dict)
    verdicts: dict[bytes, Verdict] = field(default_factory=dict)
    answers: dict[bytes, Answer] = field(default_factory=dict)
    equivocations: list[Equivocation] = field(default_factory=list)
    chains: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    roots: dict[int, bytes] = field(default_factory=dict)
    cosigned: dict[int, bytes] = field(default_factory=dict)
    notes: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def abandoned(self) -> set[bytes]:
        """Tasks that a coordinator closed for an earlier run of itself."""
        return {task for task, verdict in self.verdicts.items() if verdict.outcome == "abandoned"}

    def outputs_of(self, agent: str) -> dict[bytes, bytes]:
        """The agent's signed outputs that stand in verdicts, by task."""
        return {
            task: envelope
            for task, verdict in self.verdicts.items()
            for envelope in verdict.outputs
            if open_message(Output, envelope).header.author == agent
        }

    def expect(self, answer: client.Answer) -> None:
        """An answer that a client was told to be committed stands here, with the very value that it was told."""
        entry = self.answers.get(bytes.fromhex(answer.request))
        assert entry is not None, f"the committed answer {answer.request} is not on the ledger"
        assert [t.hex() for t in entry.tasks] == list(answer.verdicts)
        tensors = [_tensor(spec, answer.outputs[spec[0]]) for spec in entry.outputs]
        root = commit_rows("", bytes.fromhex(answer.parameters["result_salt"]), tensors, entry.rows)
        assert root == entry.result_root, f"the ledger holds another result for {answer.request} than its client got"
        assert all(self.verdicts[task].outcome == "accepted" for task in entry.tasks)


async def check_ledger(state_dir: Path, within_s: float = 40.0) -> LedgerFacts:
    """Read from the first position until every task is closed and a validator has cosigned all that was read."""
    layout = StateLayout(state_dir)
    trust = layout.load_trust()
    port = read_ports(state_dir)["ledger.client"]
    access = LedgerAccess("127.0.0.1", port, layout.ca, layout.certificate(READER), layout.key(READER))
    facts = LedgerFacts(State(trust.ledger, trust.epoch, trust.registrar))
    stream = await LedgerStream.connect(access, "ledger-check")
    try:
        live: asyncio.Queue[bytes] = asyncio.Queue()
        await stream.client.subscribe("ledger.checkpoint.>", cb=_into(live))
        await _within(within_s, _read(stream, facts), lambda: _unsettled(facts))
        await _within(within_s, _cosigned(stream, facts, trust, live), lambda: f"nobody cosigned {facts.state.size}")
    finally:
        await stream.close()
    assert {a: s.fenced for a, s in facts.state.authors.items() if s.fenced} == {}
    for size, root in facts.cosigned.items():
        assert facts.roots.get(size, root) == root, f"validators cosigned another root of size {size} than ours"
    return facts


async def _read(stream: LedgerStream, facts: LedgerFacts) -> None:
    """Fold until all is closed and a tick has marked it; what came before our first look is read in any case."""
    height, tree = await stream.height(), Frontier()
    async with contextlib.aclosing(stream.follow(0)) as messages:  # type: ignore[type-var]
        async for message in messages:
            _take(facts, tree, message)
            if message.position >= height and not facts.state.open and facts.state.size in facts.roots:
                return


def _take(facts: LedgerFacts, tree: Frontier, message: StreamMessage) -> None:
    frame = parse_frame(message.data)
    author, where = frame.header.author, f"position {message.position}"
    assert not frame.missing, f"{where}: attachments outside the frame are not read here"
    seq, previous = facts.chains.get(author, (0, NO_FRAME))
    assert (frame.header.seq, frame.header.previous) == (seq + 1, previous), f"{where}: {author}'s chain is broken"
    facts.chains[author] = (frame.header.seq, frame.digest)
    applied = apply_message(facts.state, message.data, recompute=True)
    facts.height = message.position
    for event in applied.events:
        assert event.kind != "rejected", f"{where}: an entry is rejected: {event.facts}"
    for data in applied.leaves:
        tree.append(leaf_hash(data))
        _note(facts, parse_entry(data))
    if any(event.kind == "tick" for event in applied.events):
        facts.roots[tree.size] = tree.root()


def _note(facts: LedgerFacts, entry: Entry | None) -> None:
    """Sort an entry in. The rules refuse what stands twice; that it was never even tried is for us to see."""
    if isinstance(entry, Opened):
        for task, _, rows in entry.tasks:
            assert task not in facts.opened, f"task {task.hex()} is opened twice"
            facts.opened[task] = rows
    elif isinstance(entry, Verdict):
        assert entry.task not in facts.verdicts, f"task {entry.task.hex()} has two verdicts"
        facts.verdicts[entry.task] = entry
    elif isinstance(entry, Answer):
        assert entry.request not in facts.answers, f"request {entry.request.hex()} is answered twice"
        facts.answers[entry.request] = entry
    elif isinstance(entry, Equivocation):
        facts.equivocations.append(entry)


async def _cosigned(stream: LedgerStream, facts: LedgerFacts, trust: Trust, live: asyncio.Queue[bytes]) -> None:
    """The notes that the engine keeps, and those that come, until one covers all that we have read."""
    manager = stream.client.jetstream()
    kept = (await manager.stream_info(CHECKPOINTS)).state
    for seq in range(kept.first_seq, kept.last_seq + 1):
        with contextlib.suppress(NotFoundError):  # the oldest make room while we read
            _checkpoint(facts, trust, (await manager.get_msg(CHECKPOINTS, seq)).data or b"")
    while facts.state.size not in facts.cosigned:
        _checkpoint(facts, trust, await live.get())


def _checkpoint(facts: LedgerFacts, trust: Trust, data: bytes) -> None:
    note = parse_note(data)
    checkpoint = parse_checkpoint(note.text)
    assert checkpoint.origin == trust.origin
    verify_cosignature(note, trust.validators[0])
    facts.notes.append((checkpoint.size, checkpoint.root))
    first = facts.cosigned.setdefault(checkpoint.size, checkpoint.root)
    assert first == checkpoint.root, f"a validator cosigned two roots of size {checkpoint.size}"


def _tensor(spec: Sequence[Any], array: np.ndarray) -> Tensor:
    name, dtype, dims = spec
    assert (str(array.dtype), array.shape) == (dtype, tuple(dims))
    return Tensor(name, dtype, tuple(dims), array.astype(array.dtype.newbyteorder("<")).tobytes())


def _unsettled(facts: LedgerFacts) -> str:
    tasks = ", ".join(task.hex() for task in facts.state.open)
    return f"read to position {facts.height}, size {facts.state.size}; tasks without verdict: {tasks or 'none'}"


def _into(queue: asyncio.Queue[bytes]) -> Any:
    async def put(message: Any) -> None:
        queue.put_nowait(message.data)

    return put


async def _within(seconds: float, work: Any, complaint: Callable[[], str]) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise AssertionError(f"not settled within {seconds:g} s: {complaint()}") from None
