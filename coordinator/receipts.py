"""Receipts for those who ask the gateway: one validator's, and under it the cosignatures of all the others to be had."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import structlog
from nats.errors import Error as NatsError

from bmoe.ledger.receipts import read_reply
from bmoe.ledger.rules.checkpoint import COSIGNATURE_V1, VerifierKey, verify_cosignature
from bmoe.ledger.rules.receipt import merge_receipts
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.tlog_proof import parse_proof
from bmoe.ledger.stream import LedgerStream
from bmoe.protocol.errors import BmoeError, InputError, ProofError, UnavailableError, UnknownError
from coordinator.journal import Journal

log = structlog.get_logger("receipts")
RECEIPT_TIMEOUT_S = 10.0


class Receipts:
    """Asks every validator in turn, over the ledger's engine."""

    def __init__(self, stream: LedgerStream, state: State, journal: Journal) -> None:
        self._stream = stream
        self._state = state
        self._journal = journal

    async def get(self, identity: bytes, kind: str) -> bytes:
        """The receipt of a verdict ("task") or an answer ("request"), with every validator's cosignature to be had.

        Raises UnknownError for an id that is not on the ledger, UnavailableError when no validator gives one now.
        """
        coming = identity in self._state.open or await self._journal.row(identity) is not None
        return await gather(self._stream, self._state.validators, kind, identity.hex(), coming)

    async def of_release(self, digest: str) -> bytes:
        """The receipt of an expert's or a gate's release, by its SHA-256 in hex; raises as `get` does."""
        return await gather(self._stream, self._state.validators, "release", digest, True)

    async def of_model(self, model: str, version: int) -> bytes:
        """The receipt of a model's version; raises as `get` does."""
        return await gather(self._stream, self._state.validators, "model", f"{model} {version}", True)


async def gather(stream: LedgerStream, validators: Mapping[str, bytes], kind: str, name: str, coming: bool) -> bytes:
    """A receipt with every validator's cosignature to be had; `coming` says that the entry may be on its way.

    Raises UnknownError for what is not on the ledger, UnavailableError when no validator gives a receipt now.
    """
    receipts: list[str] = []
    reasons: list[BmoeError] = []
    question: dict[str, Any] = {kind: name, **({} if coming else {"wait_ms": 0})}
    for validator in sorted(validators):
        try:
            receipts.append(await _ask(stream, validator, validators[validator], question))
        except (UnavailableError, UnknownError) as error:
            reasons.append(error)
            continue
        question = {kind: name, "size": parse_proof(receipts[0]).checkpoint.size}
    if receipts:
        return _merged(receipts).encode()
    line = f"no receipt for {name}: {'; '.join(map(str, reasons))}"
    if coming or UnknownError not in map(type, reasons):
        raise UnavailableError(line)
    raise UnknownError(line)


async def _ask(stream: LedgerStream, validator: str, public_key: bytes, question: dict[str, Any]) -> str:
    subject, data = f"ledger.receipt.{validator}", json.dumps(question).encode()
    try:
        reply = await stream.client.request(subject, data, timeout=RECEIPT_TIMEOUT_S)
    except (NatsError, OSError, asyncio.TimeoutError) as error:
        raise UnavailableError(f"{validator}: {str(error) or type(error).__name__}") from error
    try:
        text = read_reply(reply.data)
        verify_cosignature(parse_proof(text).note, VerifierKey(validator, COSIGNATURE_V1, public_key))
    except (UnknownError, UnavailableError) as error:
        raise type(error)(f"{validator}: {error}") from error
    except (InputError, ValueError) as error:
        raise UnavailableError(f"{validator} gave no receipt of its own: {error}") from error
    return text


def _merged(receipts: list[str]) -> str:
    merged = receipts[0]
    for receipt in receipts[1:]:
        try:
            merged = merge_receipts([merged, receipt])
        except ProofError as error:  # one validator's odd receipt must not cost the others'
            log.warning("receipt_not_merged", error=str(error))
    return merged
