"""Hostile bytes for a board and for clients: tasks and notices, the gateway's replies, identity files, files of sensors."""

from __future__ import annotations

import base64
import functools
import io
import json
from random import Random

import agent_helpers as helpers
import numpy as np
from identity_helpers import make_csr
from mutate import spoil, spoil_json, spoil_message
from target import MEGABYTE, Target, in_file, scratch

from bmoe.client import read_answer
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.envelope import seal, split_envelope
from bmoe.protocol.errors import (
    ConfigError,
    EncodingError,
    EnvelopeError,
    InputError,
    MessageError,
    RefusedError,
    UnavailableError,
)
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import ModelRelease, Notice, Release, Task, open_message, seal_message
from coordinator.identity.authority import Authority, check_csr
from edge_agent import requester
from edge_agent.admit import Admitted, admit, authenticate, check_inputs
from edge_agent.certificates import is_due
from edge_agent.config import load_settings
from edge_agent.fleet import pinned
from edge_agent.identity import load_identity
from edge_agent.join import _sent
from edge_agent.oip import fitted, outputs_of
from edge_agent.source_files import read_inputs

NOW_MS = 1_800_000_000_000


@functools.cache
def gateway() -> helpers.Gateway:
    """Keys of a registrar and a coordinator, the same in every run."""
    return helpers.Gateway(Signer.from_bytes(bytes([1] * 32)), Signer.from_bytes(bytes([2] * 32)))


def _tasks() -> list[bytes]:
    return [gateway().task(deadline_ms=NOW_MS + 1000)]


@functools.cache
def _release() -> Release:
    return open_message(Release, gateway().release(b"model")).header


def _from_coordinator(data: bytes) -> None:
    """As a coordinator signs it that has gone mad: admission gives a decision about everything."""
    try:
        envelope, end = split_envelope(data)
        data = seal(gateway().coordinator, Task.CONTEXT.encode(), envelope.payload) + data[end:]
    except InputError:
        pass
    rules = gateway().rules()
    decision = admit(data, rules, lambda task, size: helpers.FREE, NOW_MS)
    if isinstance(decision, Admitted):
        check_inputs(decision, _release(), rules)


def _notice(data: bytes) -> None:
    authenticate(open_message(Notice, data), gateway().rules())


def _notices() -> list[bytes]:
    header = Notice(**gateway().common("coordinator"), verdicts=((b"t" * 16, "accepted", "agree", b"r" * 32),))
    return [seal_message(gateway().coordinator, header)]


def _members() -> list[str]:
    member = gateway().member("coordinator", "coordinator", gateway().coordinator.public_key)
    return [base64.b64encode(seal_message(gateway().registrar, member)).decode()]


@functools.cache
def _facts() -> bytes:
    facts = {
        "name": "pi-1", "owner": "acme", "ledger": helpers.LEDGER.hex(), "epoch": 0, "folder": "one",
        "registrar": gateway().registrar.public_key.hex(), "members": _members(), "url": "https://10.0.0.1:8443",
        "broker": {"host": "10.0.0.1", "port": 8883},
    }  # fmt: skip
    return json.dumps(facts).encode()


def _identity(data: bytes) -> None:
    path = in_file("board/identity/identity.json", data)
    in_file("board/identity/one/signing.key", bytes([9] * 32))
    load_identity(path.parents[1])


def _vary_facts(random: Random, data: bytes) -> bytes:
    facts = json.loads(data)
    if random.random() < 0.6 or not isinstance(facts, dict):
        return spoil_json(random, data)
    statement = base64.b64decode(_members()[0])
    spoiled = spoil_message(random, statement) if random.random() < 0.5 else spoil(random, statement)
    facts["members"] = [base64.b64encode(spoiled).decode()]
    return json.dumps(facts).encode()


def _sent_before(data: bytes) -> None:
    _sent(in_file("request.json", data))


def _reply(data: bytes) -> None:
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        raise MessageError("no JSON") from None
    if isinstance(reply, dict):
        outputs_of(requester._judged(reply))


def _replies() -> list[bytes]:
    output = {"name": "y", "shape": [2, 1], "datatype": "FP32", "data": [1.5, -2]}
    parameters = {"request": "0" * 32, "verdicts": ["1" * 32], "stage": "decided", "assurance": "verified"}
    answer = {"id": "mine", "model_name": "toy", "outputs": [output], "parameters": parameters}
    return [json.dumps(answer).encode(), b'{"id": "mine", "error": "slow down", "status": 429}']


def _client_json(data: bytes) -> None:
    read_answer(data)


def _client_binary(data: bytes) -> None:
    """The head's length in front, as a header would say it."""
    read_answer(data[2:], str(int.from_bytes(data[:2], "big")))


def _client_replies() -> list[bytes]:
    parameters = {"request": "0" * 32, "verdicts": ["1" * 32], "stage": "decided", "assurance": "verified"}
    output = {"name": "y", "shape": [2, 1], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = json.dumps({"outputs": [output], "parameters": parameters}).encode()
    return [len(head).to_bytes(2, "big") + head + bytes(8)]


def _vary_binary(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:2], "big")
    head = spoil_json(random, data[2 : 2 + length])
    return (len(head) % 2**16).to_bytes(2, "big") + head + data[2 + length :]


@functools.cache
def _model() -> ReleasedModel:
    """One input x float32 [N, 4]."""
    statement = ModelRelease(
        **gateway().common("registrar"), model="wearable", version=1, manifest=bytes(32), gate=b"",
        experts=(_release().digest,), top_k=1, combine="weighted_sum", issued_ms=0, cacheable=False,
    )  # fmt: skip
    return ReleasedModel(statement, None, (_release(),))


SUFFIXES = (".json", ".csv", ".npy", ".npz")


def _file(data: bytes) -> None:
    """The first byte chooses the kind of file."""
    model = _model()
    fitted(read_inputs(f"x{SUFFIXES[data[0] % 4 if data else 0]}", data[1:], model, MEGABYTE), model.inputs, True)


def _files() -> list[bytes]:
    array, one, many = np.ones((2, 4), np.float32), io.BytesIO(), io.BytesIO()
    np.save(one, array)
    np.savez_compressed(many, x=array)
    texts = [b'{"x": [[1, 2, 3, 4]]}', b"1,2,3,4\n5,6,7,8\n", one.getvalue(), many.getvalue()]
    return [bytes((kind,)) + data for kind, data in enumerate(texts)]


def _authority(data: bytes) -> None:
    pinned(data, bytes(32))


def _certificate(data: bytes) -> None:
    try:
        is_due(data, 0.0)
    except ValueError as error:  # which its caller awaits
        raise InputError(str(error) or "no certificate") from error


def _settings(data: bytes) -> None:
    load_settings(state=in_file("agent/agent.toml", data).parent)


MESSAGE = (EncodingError, EnvelopeError, MessageError)


def _certificates() -> list[bytes]:
    return [Authority.open(scratch() / "authority").issue_device(check_csr(make_csr()), "pi-1")]


TARGETS = (
    Target("task-at-board", _from_coordinator, _tasks, (), vary=spoil_message),
    Target("notice-at-board", _notice, _notices, MESSAGE, vary=spoil_message),
    Target("identity-file", _identity, lambda: [_facts()], (ConfigError,), vary=_vary_facts),
    Target("join-request-file", _sent_before, lambda: [b'{"name": null, "csr": ""}'], (ConfigError,), vary=spoil_json),
    Target("reply-at-board", _reply, _replies, (InputError, RefusedError, UnavailableError), vary=spoil_json),
    Target("reply-at-client", _client_json, _replies, (UnavailableError,), vary=spoil_json),
    Target("binary-reply-at-client", _client_binary, _client_replies, (UnavailableError,), vary=_vary_binary),
    Target("source-file", _file, _files, (MessageError,), memory=24 * MEGABYTE),
    Target("certificate", _certificate, _certificates, (InputError,)),
    Target("agent-toml", _settings, lambda: [b'queue_limit = 8\nlog_level = "debug"\n'], (ConfigError,)),
)  # fmt: skip
