"""A model's manifest made into signed releases: what the registrar states of each expert, of the gate, and of the model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bmoe.ledger.rules.entries import Entry, ModelEntry, ReleaseEntry
from bmoe.ledger.rules.releases import under_way
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import ModelError, RefusedError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import ModelRelease, Release, seal_message
from bmoe.storage.manifest import Model, parts
from bmoe.storage.onnx_file import read_onnx_file
from bmoe.storage.onnx_rules import check_declared, check_servable
from bmoe.storage.stated import stated_tensors
from bmoe.storage.targets import experts_and_gate
from coordinator.identity.enrol import LedgerPort


def check_blobs(folder: Path, model: Model) -> None:
    """Raise RefusedError unless every file of the model lies in `folder` under its digest, whole."""
    for part in parts(model):
        path = folder / part.sha256
        if not path.is_file() or path.stat().st_size != part.bytes:
            raise RefusedError(
                f"blob {part.sha256} ({part.file}, {part.bytes} bytes) is not in the store: put it first"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != part.sha256:
            raise RefusedError(f"blob {part.sha256} ({part.file}) is damaged, it hashes to {found}: put it again")
    for part in experts_and_gate(model):
        try:
            onnx = read_onnx_file(folder / part.sha256)
            check_servable(onnx)
            check_declared(onnx, part)
        except ModelError as error:
            raise ModelError(f"{part.file}: {error}") from None


def check_publishable(state: State, model: Model) -> None:
    """Raise RefusedError, naming the next number, unless this is a new version and says nothing new of known files."""
    latest = max((version for name, version in state.versions if name == model.name), default=0)
    if (rolling := under_way(state, model.name)) is not None:
        raise RefusedError(
            f"a rollout of {model.name} {rolling.version} is under way ({rolling.stage}): let it end, or abort it first"
        )
    if (model.name, model.version) in state.versions:
        raise RefusedError(
            f"{model.name} {model.version} is published with other content: give it version {latest + 1}"
        )
    if model.version < latest:
        raise RefusedError(
            f"{model.name} {model.version} is older than {latest}, which is published: give it version {latest + 1}"
        )
    for part in experts_and_gate(model):
        known = state.releases.get(bytes.fromhex(part.sha256))
        if known is not None and (known.batch, known.inputs, known.outputs) != (part.batch, *stated_tensors(part)):
            raise RefusedError(
                f"{part.file} is released with other tensors or tolerances, and what is said of a file never changes:"
                " export it anew, so that it gets another digest"
            )


def release_entries(
    registrar: Signer, ledger: LedgerPort, model: Model, manifest_digest: bytes, owner: str, now_ms: int
) -> list[tuple[type[Entry], dict[str, Any]]]:
    """The entries that publish a model: one release a part, then the model itself, so that it never names a stranger."""
    common: dict[str, Any] = {"ledger": ledger.ledger, "epoch": ledger.epoch, "author": "registrar", "seq": now_ms}
    common["issued_ms"] = now_ms
    entries: list[tuple[type[Entry], dict[str, Any]]] = []
    for part in experts_and_gate(model):
        release = Release(
            **common, model=model.name, expert_name=part.name, digest=bytes.fromhex(part.sha256), size=part.bytes,
            opset=part.opset, memory_mb=part.memory_mb, batch=part.batch, owner=owner,
            inputs=stated_tensors(part)[0], outputs=stated_tensors(part)[1],
        )  # fmt: skip
        entries.append((ReleaseEntry, {"statement": seal_message(registrar, release)}))
    whole = ModelRelease(
        **common, model=model.name, version=model.version, manifest=manifest_digest,
        gate=bytes.fromhex(model.gate.sha256) if model.gate else b"",
        experts=tuple(bytes.fromhex(expert.sha256) for expert in model.experts), top_k=model.top_k,
        combine=model.combine, cacheable=model.cacheable,
    )  # fmt: skip
    return [*entries, (ModelEntry, {"statement": seal_message(registrar, whole)})]
