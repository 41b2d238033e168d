"""The fold: one stream message after another into the state. Every replica of a stream gets the same state and leaves.

A frame that is not acceptable, or an entry that breaks a rule, becomes a `rejected` leaf without effect; the log never
halts. Entry rules are in `membership`, `verdicts`, `answers` and `claims`, listed in `table`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.entries import Entry, Genesis, Rejected, parse_entry
from bmoe.ledger.rules.frames import Frame, read_frame
from bmoe.ledger.rules.state import TASK_WINDOW_MS, AuthorState, Context, Event, FalseEntryError, State, made_at
from bmoe.ledger.rules.table import RULES
from bmoe.protocol.errors import BmoeError, InputError, RefusedError
from bmoe.protocol.text import plain

# More than a frame can close, so that what is pruned keeps up with what comes.
PRUNE_LOOK = 512
# How the reason of a rejected leaf begins when it fenced its author, so that the leaf alone tells; and how much is quoted.
FALSE = "false: "
FENCED_SHOWN = 200
NO_GENESIS = "the first entry of a ledger must be its genesis"
# What malformed content could still raise in a rule: it must become a rejected leaf, never halt the log.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Applied:
    """What one stream position became: leaves (bytes, in order), each read as its entry (None: opaque), and events.

    `frame` is the message as parsed, None when it is no frame of this ledger.
    """

    leaves: tuple[bytes, ...]
    entries: tuple[Entry | None, ...]
    events: tuple[Event, ...]
    frame: Frame | None = None


def apply_message(
    state: State,
    data: bytes,
    fetched: dict[bytes, bytes] | None = None,
    recompute: bool = True,
    held: Sequence[bytes] | None = None,
    own: Callable[[bytes], bool] = lambda digest: False,
    frame: Frame | BmoeError | None = None,
) -> Applied:
    """Fold one stream message. Never raises for bad content; `fetched` holds attachments named but not inline.

    `frame` is what `read_frame` made of the data, where the caller has it already.
    `own` tells, by digest, a frame that the caller itself signed: its signature is not verified again.
    `held` are the leaves that this position became when the caller itself folded it before: what it found false then is
    false now, without the attachments that showed it, which are not kept for ever.
    """
    frame = read_frame(data) if frame is None else frame
    try:
        if isinstance(frame, BmoeError):
            raise frame
        _check_frame(state, frame, own)
    except BmoeError as error:
        return _reject(state, hashlib.sha256(data).digest(), "unknown", 0, str(error))
    return _apply_frame(state, frame, {**frame.attachments, **(fetched or {})}, recompute, held)


def _check_frame(state: State, frame: Frame, own: Callable[[bytes], bool]) -> None:
    header = frame.header
    if header.ledger != state.ledger or header.epoch != state.epoch:
        raise RefusedError(
            f"frame of ledger {header.ledger.hex()[:8]}/{header.epoch}, this is {state.ledger.hex()[:8]}/{state.epoch}"
        )
    key = state.key_of(header.author)
    if not own(frame.digest):
        frame.sealed.verify(key)
    author = state.authors.setdefault(header.author, AuthorState())
    if author.fenced:
        raise RefusedError(f"{header.author} is fenced: {author.fenced}")
    if header.seq != author.seq + 1 or header.previous != author.previous:
        raise RefusedError(f"{header.author}'s frame {header.seq} does not follow its frame {author.seq}")
    if not frame.entries:
        raise RefusedError(f"{header.author}'s frame {header.seq} is empty")


def _apply_frame(
    state: State, frame: Frame, attachments: dict[bytes, bytes], recompute: bool, held: Sequence[bytes] | None
) -> Applied:
    header = frame.header
    author = state.authors[header.author]
    author.seq, author.previous = header.seq, frame.digest
    context = Context(frame, attachments, recompute)
    leaves: list[bytes] = []
    entries: list[Entry | None] = []
    events: list[Event] = []
    for place, data in enumerate(frame.entries):
        known = held[place] if held is not None and len(held) == len(frame.entries) else None
        if known is not None and known != data:
            applied = _reject_again(state, author, known)
        else:
            applied = _apply_entry(state, context, author, data)
        leaves.extend(applied.leaves)
        entries.extend(applied.entries)
        events.extend(applied.events)
    _prune(state)
    return Applied(tuple(leaves), tuple(entries), tuple(events), frame)


def _apply_entry(state: State, context: Context, author: AuthorState, data: bytes) -> Applied:
    header = context.frame.header
    try:
        if author.fenced:
            raise RefusedError(f"{header.author} is fenced: {author.fenced}")
        entry = parse_entry(data)
        if entry is not None:
            _check_entry(state, context, entry)
            events = RULES[entry.TYPE](state, context, entry)
        elif state.origin:
            events = [Event("opaque", {"author": header.author})]
        else:
            raise RefusedError(NO_GENESIS)
    except (BmoeError, *UNFORESEEN) as error:
        reason = str(error) if isinstance(error, BmoeError) else "malformed content"
        if isinstance(error, FalseEntryError):
            reason = FALSE + reason
            author.fenced = reason[:FENCED_SHOWN]
        return _reject(state, hashlib.sha256(data).digest(), header.author, header.seq, reason)
    state.size += 1
    return Applied((data,), (entry,), tuple(events))


def _reject_again(state: State, author: AuthorState, leaf: bytes) -> Applied:
    entry = parse_entry(leaf)
    reason = entry.reason if isinstance(entry, Rejected) else ""
    if reason.startswith(FALSE):
        author.fenced = reason[:FENCED_SHOWN]
    state.size += 1
    return Applied((leaf,), (entry,), (Event("rejected", {"author": "", "reason": reason}),))


def _check_entry(state: State, context: Context, entry: Entry) -> None:
    header = context.frame.header
    for name in ("ledger", "epoch", "author", "seq", "time_ms"):
        if getattr(entry, name) != getattr(header, name):
            raise InputError(f"the entry's {name} is not its frame's")
    if not state.origin and not isinstance(entry, Genesis):
        raise RefusedError(NO_GENESIS)


def _reject(state: State, digest: bytes, author: str, seq: int, reason: str) -> Applied:
    rejected = Rejected(
        ledger=state.ledger,
        epoch=state.epoch,
        author=author,
        seq=seq,
        time_ms=state.time_ms,
        digest=digest,
        reason=plain(reason, 300),
    )
    state.size += 1
    return Applied((rejected.to_bytes(),), (rejected,), (Event("rejected", {"author": author, "reason": reason}),))


def _prune(state: State) -> None:
    """Forget closed tasks that can no longer be challenged, by ledger time alone, so that memory is bounded.

    Those that expire far too late (a coordinator dated them ahead) go to the end: they never hold up those behind them.
    """
    for _ in range(min(PRUNE_LOOK, len(state.closed))):
        task, closed = next(iter(state.closed.items()))
        if state.time_ms <= closed.expires_ms <= state.time_ms + 2 * TASK_WINDOW_MS:
            break
        if closed.expires_ms > state.time_ms:
            state.closed.move_to_end(task)
            continue
        del state.closed[task]
        for key in [k for k in state.claims if k[0] == task]:
            del state.claims[key]
    # By the task's own date, for a task complained of may never get a verdict.
    if state.complaints:
        state.complaints -= {k for k in state.complaints if made_at(k[0]) + TASK_WINDOW_MS < state.time_ms}
    while state.answers and next(iter(state.answers.values())) < state.time_ms:
        state.answers.popitem(last=False)
