"""Receipts on request: a validator puts together, from its replica, what an auditor needs, and answers over NATS.

Request to `ledger.receipt.<validator>`: JSON {"task": hex}, {"request": hex}, {"release": hex of the file's SHA-256} or
{"model": "NAME VERSION"}; with "size" to meet other validators' cosignatures on one checkpoint, and "wait_ms" (at most
5000) to hear sooner that there is none yet.
Reply: the receipt's text, or JSON {"error": "one clear line"}, with "unknown": true where the ledger has no such id.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bmoe.ledger.cosign import Cosigner
from bmoe.ledger.ending import end
from bmoe.ledger.rules.entries import Answer, Verdict, parse_entry
from bmoe.ledger.rules.outputs import Binding, parse_output
from bmoe.ledger.rules.receipt_format import MAX_OPENINGS_BYTES, Evidence, Support, format_receipt
from bmoe.ledger.rules.state import State
from bmoe.ledger.store import Store, model_name
from bmoe.protocol.errors import BmoeError, InputError, LedgerError, MessageError, UnavailableError, UnknownError

log = logging.getLogger("bmoe.validator")

SUBJECT = "ledger.receipt"
WAIT_MS = 5000
REQUEST_BYTES = 1024
ASKED_AT_ONCE = 64
# What may be asked for, as which kind of entry, and how many bytes name it (0: a text).
ASKED = {"task": ("verdict", 16), "request": ("answer", 16), "release": ("release", 32), "model": ("model", 0)}
# Kinds whose leaf says all: the registrar's own statement.
STATED = ("release", "model")


def make_receipt(store: Store, state: State, kind: str, name: bytes, size: int) -> str:
    """The receipt of an entry under the signed checkpoint of `size`.

    Raises LedgerError, UnavailableError, UnknownError. `kind` is "verdict" (name: task id), "answer" (request id),
    "release" (digest) or "model" (as `store.model_name` has it).
    """
    index, note = store.find(kind, name), store.note(size)
    if index is None:
        raise UnknownError(f"no {kind} for {_shown(kind, name)} stands on this ledger")
    if index >= size:
        raise UnavailableError(
            f"no {kind} for {_shown(kind, name)} stands among the first {size} leaves of this ledger"
        )
    if note is None:
        raise UnavailableError(f"no cosigned checkpoint of size {size} is kept here")
    leaf = store.leaf(index)
    if kind in STATED:
        return format_receipt(Evidence(leaf), index, store.proof(index, size), note)
    entry = parse_entry(leaf)
    supports: list[Support] = []
    verdicts: list[Verdict] = []
    models: tuple[bytes, ...] = ()
    if isinstance(entry, Answer):
        for task in entry.tasks:
            at = store.find("verdict", task)
            if at is None:
                raise LedgerError(f"the answer at leaf {index} names task {task.hex()}, which has no verdict here")
            supports.append(Support(store.leaf(at), at, tuple(store.proof(at, size))))
            verdicts.append(_verdict(store.leaf(at)))
        models = (_model_statement(store, entry),)
    else:
        verdicts = [_verdict(leaf)]
    members, releases = _statements(state, verdicts)
    openings = _openings(store, entry, verdicts)
    evidence = Evidence(leaf, tuple(supports), members, releases, models, openings)
    return format_receipt(evidence, index, store.proof(index, size), note)


def _shown(kind: str, name: bytes) -> str:
    return name.decode() if kind == "model" else name.hex()


def _verdict(leaf: bytes) -> Verdict:
    entry = parse_entry(leaf)
    if not isinstance(entry, Verdict):
        raise LedgerError(f"the replica's index names a {type(entry).__name__} as a verdict")
    return entry


def _statements(state: State, verdicts: list[Verdict]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The registrar's statements about every signer and every expert of these verdicts."""
    signers = set()
    for v in verdicts:
        binding = Binding(v.task, v.expert, v.input_root, v.rows)
        signers |= {parse_output(o, binding).header.author for o in (*v.outputs, *([v.referee] if v.referee else []))}
    members = tuple(state.statements[name] for name in sorted(signers))
    return members, tuple(state.release_statements[digest] for digest in sorted({v.expert for v in verdicts}))


def _model_statement(store: Store, answer: Answer) -> bytes:
    at = store.find("model", model_name(answer.model, answer.version))
    entry = parse_entry(store.leaf(at)) if at is not None else None
    if entry is None:
        raise LedgerError(f"the replica has no release of model {answer.model} version {answer.version}")
    return entry.statement  # type: ignore[attr-defined]


def _openings(store: Store, entry: Any, verdicts: list[Verdict]) -> tuple[bytes, ...]:
    """Every opening named, in order of digest; none at all where one is gone or they are too large together."""
    digests = {digest for v in verdicts for digest in v.openings}
    if isinstance(entry, Answer):
        digests.add(entry.result_opening)
    found = [store.opening(digest) for digest in sorted(digests)]
    whole = [opening for opening in found if opening is not None]
    if len(whole) != len(found) or sum(map(len, whole)) > MAX_OPENINGS_BYTES:
        return ()
    return tuple(whole)


class ReceiptService:
    """Answers requests for receipts, each within WAIT_MS, at most ASKED_AT_ONCE together."""

    def __init__(self, name: str, store: Store, state: State, cosigner: Cosigner) -> None:
        self._name, self._store, self._state, self._cosigner = name, store, state, cosigner
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, client: Client) -> None:
        """Subscribe; the client renews it at every reconnect."""
        await client.subscribe(f"{SUBJECT}.{self._name}", cb=self._on_request)

    async def stop(self) -> None:
        """Give up what is still being answered."""
        await end(*self._tasks)

    async def _on_request(self, message: Msg) -> None:
        if len(self._tasks) >= ASKED_AT_ONCE:
            await _reply(message, _error("busy: ask again in a moment"))
            return
        task = asyncio.create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Msg) -> None:
        try:
            reply = (await self._receipt(_parse(message.data))).encode()
        except asyncio.TimeoutError:
            reply = _error("not under a cosigned checkpoint yet: ask again later")
        except UnknownError as error:
            reply = _error(str(error), unknown=True)
        except (BmoeError, sqlite3.Error) as error:
            reply = _error(str(error))
        await _reply(message, reply)

    async def _receipt(self, asked: _Asked) -> str:
        def under() -> bool:
            index, signed = self._store.find(asked.kind, asked.name), self._cosigner.signed
            return index is not None and signed > index and (asked.size is None or signed >= asked.size)

        if not under():
            try:
                await self._cosigner.until(under, asked.wait_s)
            except asyncio.TimeoutError:
                if self._store.find(asked.kind, asked.name) is None:
                    raise UnknownError(
                        f"no {asked.kind} for {_shown(asked.kind, asked.name)} stands on this ledger"
                    ) from None
                raise
        size = self._cosigner.signed if asked.size is None else asked.size
        return make_receipt(self._store, self._state, asked.kind, asked.name, size)


@dataclass(frozen=True)
class _Asked:
    """A parsed request: what kind of entry, its name, the size wanted if any, and how long to wait."""

    kind: str
    name: bytes
    size: int | None
    wait_s: float


def _parse(data: bytes) -> _Asked:
    """Raises MessageError for anything but the request that this file's first lines describe."""
    try:
        values: Any = json.loads(data) if len(data) <= REQUEST_BYTES else None
        size, wait_ms = values.pop("size", None), values.pop("wait_ms", WAIT_MS)
        ((field, name),) = values.items()
        kind, length = ASKED[field]
        raw = name.encode() if kind == "model" else bytes.fromhex(name)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise MessageError(f"a receipt is asked for with one of {', '.join(ASKED)}") from error
    if length not in (0, len(raw)) or not (size is None or (type(size) is int and 0 < size < 2**63)):
        raise MessageError("a task or request id has 16 bytes, a release's digest 32, a size is a positive integer")
    if type(wait_ms) is not int or not 0 <= wait_ms <= WAIT_MS:
        raise MessageError(f"wait_ms is an integer in 0..{WAIT_MS}")
    return _Asked(kind, raw, size, wait_ms / 1000)


def _error(text: str, **more: bool) -> bytes:
    return json.dumps({"error": text, **more}).encode()


async def _reply(message: Msg, data: bytes) -> None:
    try:
        await message.respond(data)
    except (NatsError, OSError) as error:
        log.warning("receipt reply failed error=%s", error)


def read_reply(data: bytes) -> str:
    """The receipt in a reply; raises UnknownError or UnavailableError with the validator's own words."""
    if data[:1] != b"{":
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError("the reply is neither a receipt nor an error") from error
    try:
        values = json.loads(data)
        said = " ".join(str(values["error"]).split())[:300] or "the validator gives no receipt, and no reason"
    except (ValueError, LookupError, TypeError, RecursionError) as wrong:
        raise InputError("the reply is neither a receipt nor an error") from wrong
    raise UnknownError(said) if values.get("unknown") is True else UnavailableError(said)
