"""Hostile bytes for the gateway: requests, bodies, what devices say, tokens, journal, callout, enrolment, settings, files."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import orjson
from identity_helpers import Board
from ledger_fixtures import TOY
from mutate import spoil, spoil_json, spoil_message
from target import MEGABYTE, Target, in_file
from targets_ledger import ledger

from bmoe.ledger.rules.outputs import Binding
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.envelope import seal, split_envelope
from bmoe.protocol.errors import (
    BmoeError,
    ConfigError,
    InputError,
    LimitError,
    ManifestError,
    MessageError,
    RefusedError,
)
from bmoe.protocol.figures import read_figures
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Health, Installed, Output, Refusal, Status, open_message, seal_message
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.topics import topic
from bmoe.storage.manifest import parse_manifest, render_manifest
from bmoe.storage.packaged import packaged
from coordinator import mqtt_requests
from coordinator.api_tokens import Admissions, ApiToken, format_admissions, parse_admissions
from coordinator.bodies import decompressed
from coordinator.config import load_settings
from coordinator.embedded.ports import read_ports
from coordinator.fleet import DurableStorage
from coordinator.identity.callout import Callout
from coordinator.identity.directory import Directory
from coordinator.identity.enrol import read_request
from coordinator.identity.jwt import Issuer, read_claims
from coordinator.intake import take_in
from coordinator.jobs import Answered, Request, Result
from coordinator.receive import open_from, receive_output
from coordinator.records import (
    Submission,
    pack_answered,
    pack_request,
    unpack_answered,
    unpack_request,
)
from coordinator.replies import reply_values
from coordinator.state_layout import StateLayout
from coordinator.tenants import Tenant

LIMIT = 256 * 1024


@functools.cache
def served() -> ReleasedModel:
    """The toy model as the ledger has it: x float32 [N, 4] -> y float32 [N, 3]."""
    state = ledger().fleet.state
    return ReleasedModel(state.models["toy"], None, (state.releases[TOY],))


def _json_body(data: bytes) -> None:
    take_in(data, served(), "public", "referee", 8, clock=lambda: 1)


def _json_bodies() -> list[bytes]:
    x = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1, 2.5, -3, 4e3, 0, 0, 0, 1]}
    nested = {**x, "data": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    parameters = {"policy": "full", "wait": "final", "assurance": "verified"}
    whole = {"id": "mine", "inputs": [nested], "outputs": [{"name": "y"}], "parameters": parameters}
    return [json.dumps({"inputs": [x]}).encode(), json.dumps(whole).encode()]


def _binary_body(data: bytes) -> None:
    """The head's length in front, as a header would say it."""
    take_in(data[2:], served(), "public", "referee", 8, head_bytes=int.from_bytes(data[:2], "big"))


def _binary_bodies() -> list[bytes]:
    x = {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
    head = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    return [len(head).to_bytes(2, "big") + head + np.arange(8, dtype="<f4").tobytes()]


def _vary_binary(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:2], "big")
    head, rest = spoil_json(random, data[2 : 2 + length]), data[2 + length :]
    return (len(head) % 2**16).to_bytes(2, "big") + head + (rest if random.random() < 0.7 else spoil(random, rest))


def _compressed(data: bytes) -> None:
    assert len(decompressed(data, "gzip", LIMIT)) <= LIMIT


def _compressed_bodies() -> list[bytes]:
    bomb = gzip.compress(bytes(16 * MEGABYTE), mtime=0)
    return [gzip.compress(b'{"inputs": []}' * 50, mtime=0), zlib.compress(bytes(LIMIT)), bomb]


def _mqtt_id(data: bytes) -> None:
    mqtt_requests.id_of(data)


UP = {"output": Output, "refusal": Refusal, "status": Status, "health": Health, "installed": Installed}


def _from_device(data: bytes) -> None:
    """As a device that is enrolled signs it: whatever the header says, the signature is good."""
    fleet, task = ledger().fleet, ledger().task
    try:
        envelope, end = split_envelope(data)
    except InputError:
        data = data[:2000]
    else:
        for cls in UP.values():
            try:
                author, context = open_message(cls, data, 65).header.author, cls.CONTEXT.encode()
            except InputError:
                continue
            data = seal(fleet.signers.get(author, fleet.signers["agent-1"]), context, envelope.payload) + data[end:]
    for channel, cls in UP.items():
        try:
            sealed = open_from(fleet.state, topic("agent-1", channel), data, cls)
        except BmoeError:
            continue
        if cls is Output:
            binding = Binding(task.task, TOY, task.input_root, task.rows)
            receive_output(sealed, binding, fleet.state.releases[TOY])


def _device_messages() -> list[bytes]:
    fleet, task = ledger().fleet, ledger().task
    signer, common = fleet.signers["agent-1"], fleet.common("agent-1", 9)
    status = Status(
        **common, state="online", started_ms=1, version="1", board="Pi", provider="CPU", memory_mb=64, queue_limit=8
    )
    refusal = Refusal(**common, task=task.task, reason="busy", detail="full")
    installed = Installed(
        **common, rollout=b"r" * 16, model="toy", version=2, state="refused", reason="self-test: no", carrier="https"
    )
    headers = (status, refusal, installed)
    return [fleet.output("agent-1", task).message, *(seal_message(signer, header) for header in headers)]


def _tokens_file(data: bytes) -> None:
    content = parse_admissions(data, Path("tokens.json"))
    assert all(content.tenant(token.tenant).name == token.tenant for token in content.tokens)
    assert parse_admissions(format_admissions(content), Path("tokens.json")) == content


def _tokens_files() -> list[bytes]:
    one = ApiToken("ab" * 4, "0" * 64, "ada", False, 1, 2**41)
    tenants = {"ada": Tenant("ada", frozenset({"toy"}), 1.5, 3, 2), "bob": Tenant("bob")}
    whole = Admissions(tenants, [one, dataclasses.replace(one, operator=True)], True)
    return [format_admissions(whole), format_admissions(Admissions())]


def _models(name: str, version: int) -> ReleasedModel:
    if (name, version) != ("toy", 1):
        raise MessageError("no such model")
    return served()


@functools.cache
def _request() -> Request:
    x = Tensor("x", "float32", (2, 4), bytes(32))
    return Request(
        b"r" * 16, "ada", served(), (x,), 2, "referee", "decided", "mine", 7, ("y",), b"s" * 16, "pi-1 00"
    )  # fmt: skip


@functools.cache
def _answered() -> Answered:
    result = Result((Tensor("y", "float32", (2, 3), bytes(24)),), b"r" * 16, b"R" * 32, b"Q" * 32, b"s" * 16)
    return Answered(_request(), result, (b"t" * 16,), "decided", b"promise")


def _kept_request(data: bytes) -> None:
    pack_request(unpack_request(data, _models))


def _kept_answer(data: bytes) -> None:
    orjson.dumps(reply_values(unpack_answered(data, _models)))


def _kept_entry(data: bytes) -> None:
    submission = Submission.from_bytes(data)
    assert Submission.from_bytes(submission.to_bytes()) == submission


def _kept_entries() -> list[bytes]:
    fields = {"task": b"t" * 16, "rows": 2, "assigned": ("agent-1",), "outcome": "accepted"}
    return [Submission(fields, (b"opening",), (b"d" * 32,)).to_bytes()]


def _vary_strings(random: Random, data: bytes) -> bytes:
    """An odd value in the head of a journal record."""
    from mutate import spoil_cbor

    from bmoe.protocol.encoding import bstr, read_bstr

    head, end = read_bstr(data, 0)
    return bstr(spoil_cbor(random, head)) + data[end:]


@functools.cache
def _callout() -> Callout:
    def fail(event: str, **facts: Any) -> None:
        assert event != "callout_failed", facts

    import nkeys

    issuer = Issuer(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_ACCOUNT))
    return Callout(issuer, Directory(), fail, clock=lambda: 1_800_000_000.0)


def _jwt(data: bytes) -> None:
    """What the broker puts to the callout; the claims alone, for they are not verified by their signature."""
    _callout().answer(b"e30." + base64.urlsafe_b64encode(data) + b".c2ln")
    _callout().answer(data)
    read_claims(data)


def _jwts() -> list[bytes]:
    pem = Board(signer=Signer.from_bytes(bytes([7] * 32))).csr.replace("CERTIFICATE REQUEST", "CERTIFICATE")
    nats = {
        "server_id": {"id": "NSERVER"}, "user_nkey": "UUSER",
        "client_info": {"mqtt_id": "pi-1", "host": "10.0.0.1", "type": "mqtt"},
        "client_tls": {"verified_chains": [[pem]]},
    }  # fmt: skip
    claims = json.dumps({"nats": nats}).encode()
    return [claims, b"e30." + base64.urlsafe_b64encode(claims) + b".c2ln"]


def _enrolment(data: bytes) -> None:
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise MessageError("no JSON") from None
    read_request(body)


@functools.cache
def _enrolments() -> tuple[bytes, ...]:
    board = Board(signer=Signer.from_bytes(bytes([7] * 32)))
    return (json.dumps(board.request(b"t" * 8, b"s" * 16)).encode(),)


def _vary_enrolment(random: Random, data: bytes) -> bytes:
    """Another field, another certificate request, or another header in the signed enrolment."""
    body = json.loads(data)
    fate = random.random()
    if fate < 0.4:
        return spoil_json(random, data)
    if fate < 0.7:
        lines = body["csr"].splitlines()
        der = spoil(random, base64.b64decode("".join(lines[1:-1])))
        body["csr"] = "\n".join([lines[0], base64.encodebytes(der).decode().strip(), lines[-1], ""])
    else:
        body["enrolment"] = base64.b64encode(spoil_message(random, base64.b64decode(body["enrolment"]))).decode()
    return json.dumps(body).encode()


def _manifest(data: bytes) -> None:
    model = parse_manifest(data)
    assert parse_manifest(render_manifest(model)) == model


def _settings(data: bytes) -> None:
    folder = in_file("settings/gateway.toml", data).parent
    load_settings(state=folder)


def _ports(data: bytes) -> None:
    read_ports(in_file("ports/ports.json", data).parent)


def _reach(data: bytes) -> None:
    layout = StateLayout(in_file("reach/reach.json", data).parent)
    layout.dial("api_host")
    layout.api_tls()


def _view(data: bytes) -> None:
    DurableStorage(in_file("fleet.json", data)).read()


def _figures(data: bytes) -> None:
    read_figures(in_file("figures.json", data))


SETTINGS = b'host = "0.0.0.0"\npublic_hosts = ["gw.local"]\nmqtt_port = 8883\nwindow_ms = 5.5\npolicy = "full"\n'
BODY = (MessageError,)
TARGETS = (
    Target("infer-json", _json_body, _json_bodies, BODY, vary=spoil_json),
    Target("infer-binary", _binary_body, _binary_bodies, BODY, vary=_vary_binary),
    Target("compressed-body", _compressed, _compressed_bodies, (MessageError, LimitError), memory=2 * MEGABYTE),
    Target("mqtt-request-id", _mqtt_id, _json_bodies, BODY, vary=spoil_json),
    Target("device-message", _from_device, _device_messages, (InputError, RefusedError), vary=spoil_message),
    Target("api-tokens-file", _tokens_file, _tokens_files, (ConfigError,), vary=spoil_json),
    Target("journal-request", _kept_request, lambda: [pack_request(_request())], (InputError,), vary=_vary_strings),
    Target("journal-answer", _kept_answer, lambda: [pack_answered(_answered())], (InputError,), vary=_vary_strings),
    Target("journal-entry", _kept_entry, _kept_entries, (InputError,), vary=_vary_strings),
    Target("callout-request", _jwt, _jwts, (MessageError,), vary=spoil_json),
    Target("enrolment", _enrolment, _enrolments, (InputError,), vary=_vary_enrolment),
    Target("manifest", _manifest, lambda: [(packaged("models", "wearable") / "model.json").read_bytes()],
           (ManifestError,), vary=spoil_json),
    Target("gateway-toml", _settings, lambda: [SETTINGS], (ConfigError,)),
    Target("ports-file", _ports, lambda: [b'{"broker.mqtt": 8883, "api": 8080}'], (ConfigError,), vary=spoil_json),
    Target("reach-file", _reach, lambda: [b'{"host": "10.0.0.1", "api_host": "::1", "api_scheme": "https"}'],
           (ConfigError,), vary=spoil_json),
    Target("fleet-view", _view, lambda: [b'{"_default": {"1": {"agent": "pi-1"}}}'], (), vary=spoil_json),
    Target("figures-file", _figures, lambda: [b'{"size": 3, "age_s": 1.5}'], (InputError,), vary=spoil_json),
)  # fmt: skip
