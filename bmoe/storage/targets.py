"""How a repository names things: the targets of a model's version, its roles, and where each file lies.

targets   MODEL/VERSION/model.json, MODEL/VERSION/origin.json, MODEL/EXPERT/SHA256.onnx, MODEL/EXPERT/SHA256.npz (golden)
roles     root, targets, snapshot, timestamp, and owner-NAME for the targets of each owner's models
files     metadata/N.ROLE.json and metadata/timestamp.json (TUF, consistent snapshots); blobs/SHA256 for every target;
          receipts/releases/SHA256, receipts/models/MODEL/VERSION, added by the gateway that serves them
"""

from __future__ import annotations

import re

from bmoe.storage.manifest import Expert, Model

METADATA_BYTES = 5_000_000
OWNER_PREFIX = "owner-"
_TARGET = re.compile(r"[a-z0-9-]{1,64}/([1-9][0-9]{0,9}/(model|origin)\.json|[a-z0-9-]{1,64}/[0-9a-f]{64}\.(onnx|npz))")


def metadata_path(name: str) -> str:
    """Where a metadata file lies: "timestamp", or "3.snapshot"."""
    return f"metadata/{name}.json"


def blob_path(sha256: str) -> str:
    """Where the bytes of a target lie."""
    return f"blobs/{sha256}"


def release_receipt_path(sha256: str) -> str:
    """Where the ledger's receipt of an expert's or gate's release is to be had."""
    return f"receipts/releases/{sha256}"


def model_receipt_path(model: str, version: int) -> str:
    """Where the ledger's receipt of a model's version is to be had."""
    return f"receipts/models/{model}/{version}"


def manifest_target(model: str, version: int) -> str:
    """The target that is a version's manifest."""
    return f"{model}/{version}/model.json"


def origin_target(model: str, version: int) -> str:
    """The target that says where a version comes from."""
    return f"{model}/{version}/origin.json"


def is_target(path: str) -> bool:
    """Whether this is the path of a target as this file names them."""
    return _TARGET.fullmatch(path) is not None


def owner_role(owner: str) -> str:
    """The delegated role of an owner."""
    return OWNER_PREFIX + owner


def owned_paths(model: str) -> str:
    """The pattern of a model's targets: TUF's `*` does not reach over a `/`."""
    return f"{model}/*/*"


def part_targets(model: Model) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each ONNX file and golden pair of a model, by target."""
    found: dict[str, tuple[int, str]] = {}
    for part in experts_and_gate(model):
        found[f"{model.name}/{part.name}/{part.sha256}.onnx"] = (part.bytes, part.sha256)
        if part.golden is not None:
            golden = part.golden
            found[f"{model.name}/{part.name}/{golden.sha256}.npz"] = (golden.bytes, golden.sha256)
    return found


def experts_and_gate(model: Model) -> tuple[Expert, ...]:
    """Everything that is released by itself."""
    return (*model.experts, model.gate) if model.gate is not None else model.experts
