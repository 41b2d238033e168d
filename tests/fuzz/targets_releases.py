"""Hostile bytes for releases: what a board's updater reads of a repository, what its keeper reads, and the files between."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from mutate import spoil, spoil_json, spoil_message
from onnx_models import mlp
from release_site import Site, golden_of, linear, parts_of
from securesystemslib.signer import Signer
from target import MEGABYTE, Target, in_file, scratch
from targets_board import MESSAGE, gateway
from tuf.api.metadata import Metadata

from bmoe.protocol.envelope import seal, split_envelope
from bmoe.protocol.errors import ConfigError, InputError, ManifestError, ModelError, RefusedError
from bmoe.protocol.messages import Update, open_message, seal_message
from bmoe.storage.blobs import FolderStore
from bmoe.storage.golden import read_golden, write_golden
from bmoe.storage.installed import Version, read_record, switch
from bmoe.storage.onnx_file import read_onnx
from bmoe.storage.onnx_rules import opset_of, reasons_against
from bmoe.storage.origin import check_origin, make_origin
from bmoe.storage.publication import bundle, versions
from bmoe.storage.repository import UnsignedError
from bmoe.storage.repository_drafts import described, place, read_drafts, write_drafts
from bmoe.storage.repository_keys import read_public, render_public, write_key
from bmoe.storage.targets import blob_path, model_receipt_path, release_receipt_path
from bmoe.storage.update_source import Received
from bmoe.storage.updater import Wanted, apply
from coordinator.cli.release import _lines
from edge_agent.admit import authenticate
from edge_agent.wanted import Result, read_result, read_wanted, wanted_of, write_result, write_wanted

BOARD = "edge-01"


@functools.cache
def site() -> Site:
    """A repository with one version, whose files are `files()`."""
    with unsynced():
        (scratch() / "site").mkdir()
        made = Site(scratch() / "site")
        made.release(made.model(1))
    return made


@functools.cache
def files() -> dict[str, bytes]:
    """All that an updater reads of that version, by path."""
    made = bundle(site().repository, "lines", 1)
    receipts = [model_receipt_path("lines", 1), *map(release_receipt_path, parts_of(site().model(1)))]
    paths = [*receipts, *map(blob_path, made.blobs)]
    return {**made.metadata, **{path: site().read(path, MEGABYTE) for path in paths}}


@contextlib.contextmanager
def unsynced() -> Iterator[None]:
    """No waiting for the disk."""
    fsync, os.fsync = os.fsync, lambda handle: None
    try:
        yield
    finally:
        os.fsync = fsync


def _placed(data: bytes) -> tuple[str, bytes]:
    """Which file it is that is spoiled, by the first byte; metadata are signed anew by the right keys, if they can be."""
    path = sorted(files())[data[0] % len(files())] if data else "metadata/timestamp.json"
    return path, _signed(path, data[1:])


def _signed(path: str, data: bytes) -> bytes:
    if not path.startswith("metadata/"):
        return data
    role = path.removeprefix("metadata/").removesuffix(".json").split(".")[-1]
    with contextlib.suppress(Exception):  # what is no metadata stays as it is
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        metadata.signatures.clear()
        for signer in _signers(role):
            metadata.sign(signer, append=True)
        return metadata.to_bytes()
    return data


@functools.cache
def _signers(role: str) -> tuple[Signer, ...]:
    found = map(site().repository.keys.signer, site().repository.load().trusts(role).keyids)
    return tuple(signer for signer in found if signer is not None)


def _update(data: bytes) -> None:
    """The whole of an update, whatever stands in one of its files: it is refused, or installed, and nothing is raised."""
    path, spoiled = _placed(data)
    board = scratch() / "board"
    shutil.rmtree(board, ignore_errors=True)
    board.mkdir()
    source = Received({**files(), path: spoiled})
    with unsynced():
        found = apply(source, board, Wanted("lines", 1), site().trusted(), lambda *_: None)
    reason = getattr(found, "reason", "")
    assert "\n" not in reason and len(reason) <= 400, reason


def _updates() -> list[bytes]:
    return [bytes([number]) + files()[path] for number, path in enumerate(sorted(files()))]


def _vary_file(random: Random, data: bytes) -> bytes:
    path = sorted(files())[data[0] % len(files())]
    if path.startswith("metadata/"):
        return data[:1] + spoil_json(random, data[1:])
    return data[:1] + spoil(random, data[1:])


def _kept(data: bytes) -> None:
    """What the keeper reads of a store that others write to."""
    path, spoiled = _placed(data)
    folder = site().folder / "repository"
    before = (folder / path).read_bytes() if (folder / path).exists() else None
    try:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)  # a blob may be a link
        (folder / path).write_bytes(spoiled)
        for found in versions(site().repository.load()):
            bundle(site().repository, found.model, found.version)
    finally:
        (folder / path).unlink(missing_ok=True)
        if before is not None:
            (folder / path).write_bytes(before)


@functools.cache
def _drafts() -> bytes:
    with unsynced():
        owner, key = site().repository, write_key(scratch() / "elsewhere.key")
        try:
            owner.rotate("owner-ada", public=[key])
        except UnsignedError as error:
            return write_drafts(error.drafts, error.signers)
    raise AssertionError("nothing to sign")


def _draft(data: bytes) -> None:
    documents, _ = read_drafts(data)
    described(data)
    repository = site().repository
    place(FolderStore(site().folder / "repository"), repository.load(), documents, repository._now())


def _public(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("no JSON") from None
    assert render_public(read_public(values))["keyid"] == values["keyid"]


@functools.cache
def _public_keys() -> tuple[bytes, ...]:
    return (json.dumps(render_public(write_key(scratch() / "a.key"))).encode(),)


def _update_message(data: bytes) -> None:
    """As a coordinator signs it that has gone mad; what is wanted is kept, and read back the same."""
    try:
        envelope, end = split_envelope(data)
        data = seal(gateway().coordinator, Update.CONTEXT.encode(), envelope.payload) + data[end:]
    except InputError:
        pass
    sealed = open_message(Update, data)
    if authenticate(sealed, gateway().rules()) is None:
        wanted = wanted_of(sealed.header)
        with unsynced():
            write_wanted(scratch() / "wants", wanted)
        assert read_wanted(scratch() / "wants") == wanted


def _update_messages() -> list[bytes]:
    facts: dict[str, Any] = {"rollout": b"r" * 16, "model": "lines", "version": 2, "digests": (b"d" * 32, b"e" * 32)}
    header = Update(**gateway().common("coordinator"), agent=BOARD, carrier="flower", superlink="10.0.0.1:9443",
                    issued_ms=5, **facts)  # fmt: skip
    return [seal_message(gateway().coordinator, header)]


def _wanted(data: bytes) -> None:
    wanted = read_wanted(in_file("wanted/updates/rollout/wanted.json", data).parents[2])
    assert wanted is None or len(wanted.rollout) >= 0


def _wanted_files() -> list[bytes]:
    state = scratch() / "wants"
    write_wanted(state, wanted_of(open_message(Update, _update_messages()[0]).header))
    return [(state / "updates" / "rollout" / "wanted.json").read_bytes()]


def _result(data: bytes) -> None:
    state = in_file("result/updates/rollout/result.json", data).parents[2]
    wanted = wanted_of(open_message(Update, _update_messages()[0]).header)
    found = read_result(state, wanted)
    assert found is None or found.rollout == wanted.rollout


def _result_files() -> list[bytes]:
    write_result(scratch() / "results", Result(b"r" * 16, "refused", "check: no"))
    return [(scratch() / "results" / "updates" / "rollout" / "result.json").read_bytes()]


def _record(data: bytes) -> None:
    read_record(in_file("record/updates/lines.json", data).parents[1], "lines")


def _records() -> list[bytes]:
    state = scratch() / "records"
    for version in (1, 2):
        switch(state, "lines", Version(version, "ab" * 32, ("cd" * 32,)))
    return [(state / "updates" / "lines.json").read_bytes()]


def _golden(data: bytes) -> None:
    read_golden(data)


def _goldens() -> list[bytes]:
    one = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    return [golden_of(linear(1)[1]), write_golden(one, {"y": np.array(7, np.int64)})]


def _origin(data: bytes) -> None:
    statement = check_origin(data)
    facts = {"model": "m", "version": 1, "state": "kept", "final": True, "owner": "ada", "threshold": 1, "keys": 1}
    shown = _lines({**facts, "manifest": "", "parts": [], "expires": {}, "origin": "", "origin_statement": statement})
    assert all(line.isprintable() for line in shown)


def _origins() -> list[bytes]:
    facts = {"data": {"a": "0" * 64}, "code": {"uri": "u", "commit": "c"}, "seeds": {"s": 1}}
    return [make_origin(site().model(1), {}), make_origin(site().model(1), facts)]


def _onnx(data: bytes) -> None:
    found = read_onnx(data)
    assert all(reason and "\n" not in reason for reason in reasons_against(found))
    opset_of(found)


TARGETS = (
    Target("update", _update, _updates, (), memory=16 * MEGABYTE, vary=_vary_file),
    Target("repository-store", _kept, _updates, (ConfigError, InputError), memory=16 * MEGABYTE, vary=_vary_file),
    Target("drafts-file", _draft, lambda: [_drafts()], (InputError, RefusedError), memory=16 * MEGABYTE, vary=spoil_json),
    Target("public-key-file", _public, _public_keys, (InputError,), vary=spoil_json),
    Target("update-at-board", _update_message, _update_messages, MESSAGE, vary=spoil_message),
    Target("wanted-file", _wanted, _wanted_files, (ConfigError,), vary=spoil_json),
    Target("result-file", _result, _result_files, (), vary=spoil_json),
    Target("installed-record", _record, _records, (ConfigError,), vary=spoil_json),
    Target("golden-pair", _golden, _goldens, (ManifestError,), memory=8 * MEGABYTE),
    Target("origin-statement", _origin, _origins, (InputError,), vary=spoil_json),
    Target("onnx-file", _onnx, lambda: [mlp(), linear(1)[0]], (ModelError,), memory=8 * MEGABYTE),
)  # fmt: skip
