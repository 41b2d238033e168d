"""Finality: which size of the tree a quorum of validators has cosigned, and where answers and verdicts stand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import structlog

from bmoe.ledger.rules.checkpoint import (
    COSIGNATURE_V1,
    Note,
    VerifierKey,
    parse_checkpoint,
    parse_note,
    verify_cosignature,
)
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.merkle import Frontier, leaf_hash
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import LedgerStream
from bmoe.protocol.errors import ProofError
from bmoe.protocol.figures import Seconds

log = structlog.get_logger("finality")
CHECKPOINT_SUBJECTS = "ledger.checkpoint.>"
INDICES_KEPT = 200_000
SIZES_KEPT = 256
GREW_KEPT = 100_000


class Finality:
    """Follows validators' checkpoints; knows the leaf index of recent verdicts and answers."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._cosigned: OrderedDict[tuple[int, bytes], set[str]] = OrderedDict()
        self._index: OrderedDict[bytes, int] = OrderedDict()
        self._grown = asyncio.Condition()
        self.final_size = 0
        self.disagreement = ""
        self._tree = Frontier()
        self._roots: OrderedDict[int, bytes] = OrderedDict()
        self._grew: deque[tuple[int, float]] = deque(maxlen=GREW_KEPT)  # sizes not final yet, and since when
        self.lag_s = Seconds()

    async def follow(self, stream: LedgerStream) -> None:
        """Begin to listen; cosignatures are verified, whoever brings them."""
        await stream.client.subscribe(CHECKPOINT_SUBJECTS, cb=self._on_message)
        self._grew.clear()  # what an earlier run left is final or not, and nobody says so again on an idle ledger

    def on_applied(self, applied: Applied) -> None:
        """Note where verdicts and answers stand, and grow our own tree: its roots must be the validators'."""
        for leaf in applied.leaves:
            self._tree.append(leaf_hash(leaf))
        if any(event.kind in ("verdict", "answer") for event in applied.events):
            self._grew.append((self._tree.size, time.monotonic()))
        for event in applied.events:
            if event.kind in ("verdict", "answer"):
                entry = event.facts["entry"]
                self._index[entry.request if event.kind == "answer" else entry.task] = event.facts["index"]
            elif event.kind == "tick" and event.facts["size"] == self._tree.size:
                self._roots[self._tree.size] = self._tree.root()
        while len(self._roots) > SIZES_KEPT:
            self._roots.popitem(last=False)
        while len(self._index) > INDICES_KEPT:
            self._index.popitem(last=False)

    @property
    def unfinal_s(self) -> float:
        """For how many seconds the oldest verdict or answer on the ledger has waited to be final; 0 if none waits."""
        return time.monotonic() - self._grew[0][1] if self._grew else 0.0

    def _note_lag(self) -> None:
        now = time.monotonic()
        while self._grew and self._grew[0][0] <= self.final_size:
            self.lag_s.add(now - self._grew.popleft()[1])

    def index_of(self, identity: bytes) -> int | None:
        """The leaf index of a recent verdict (task id) or answer (request id)."""
        return self._index.get(identity)

    async def final(self, identity: bytes, timeout_s: float) -> None:
        """Wait until the leaf of a verdict or answer is under a quorum's checkpoint."""

        def reached() -> bool:
            index = self._index.get(identity)
            return index is not None and index < self.final_size

        await self.until(reached, timeout_s)

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something holds that checkpoints bring about; raises asyncio.TimeoutError."""

        async def wait() -> None:
            async with self._grown:
                await self._grown.wait_for(holds)

        await asyncio.wait_for(wait(), timeout_s)

    async def tell(self) -> None:
        """Have those who wait look again."""
        async with self._grown:
            self._grown.notify_all()

    async def _on_message(self, message: object) -> None:
        try:
            self.note(message.data)  # type: ignore[attr-defined]
        except ProofError as error:
            log.warning("checkpoint_refused", error=str(error))
            return
        await self.tell()

    def _compare(self, size: int, root: bytes) -> None:
        """A quorum that rejects what we entered has another root: then nothing we decide is committed any more."""
        own = self._roots.get(size)
        if own is not None and own != root and not self.disagreement:
            self.disagreement = (
                f"validators cosigned {root.hex()[:16]} at size {size}, this coordinator has {own.hex()[:16]}"
            )
            log.critical("validators_disagree", detail=self.disagreement)

    def _signers(self, note: Note) -> set[str]:
        """The validators whose cosignature on this note is good, whoever brought it."""
        signers = set()
        for name, public_key in self._state.validators.items():
            with contextlib.suppress(ProofError):
                verify_cosignature(note, VerifierKey(name, COSIGNATURE_V1, public_key))
                signers.add(name)
        return signers

    def note(self, data: bytes) -> None:
        """Count the cosignatures of one checkpoint note; raises ProofError when it is not one of this ledger."""
        note = parse_note(data)
        checkpoint = parse_checkpoint(note.text)
        if checkpoint.origin != self._state.origin:
            raise ProofError(f"checkpoint of {checkpoint.origin!r}, this is {self._state.origin!r}")
        signed = self._signers(note)
        if not signed:
            raise ProofError(f"checkpoint of size {checkpoint.size} bears no validator's cosignature")
        cosigners = self._cosigned.setdefault((checkpoint.size, checkpoint.root), set())
        cosigners |= signed
        if self._state.quorum and len(cosigners) >= self._state.quorum:
            self.final_size = max(self.final_size, checkpoint.size)
            self._note_lag()
            self._compare(checkpoint.size, checkpoint.root)
        while len(self._cosigned) > SIZES_KEPT:
            self._cosigned.popitem(last=False)
