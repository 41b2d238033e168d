"""Publishing a model: its files staged by digest, its manifest given to the registrar, which enters the releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import sync_folder, write_durably
from bmoe.storage.manifest import MANIFEST_NAME, Model, load_model, parts, read_part
from bmoe.storage.packaged import packaged
from coordinator.cli.admin import Admin
from coordinator.embedded.state_dir import private_dir
from coordinator.state_layout import StateLayout


def model_folder(given: str) -> Path:
    """The folder of a model: of a built-in one by name, else a path. Raises ConfigError."""
    folder = Path(given)
    if "/" not in given:
        try:
            return packaged("models", given)
        except ConfigError:
            if not (folder / MANIFEST_NAME).is_file():
                raise
    return folder


def publish(state: Path, folder: Path, owner: str) -> dict[str, Any]:
    """Stage the files of a model and have the registrar of a running gateway enter its releases.

    Returns the registrar's reply: model, version, and the ledger position, 0 where that version was there before.
    Raises ManifestError for a folder that is not what its manifest says, RefusedError as the registrar does.
    """
    stage(StateLayout(state), folder)
    return Admin(state).call("POST", f"/v1/admin/releases?owner={owner}", (folder / MANIFEST_NAME).read_bytes())


def stage(layout: StateLayout, folder: Path) -> Model:
    """Put every file of a model where agents fetch it from, under its digest, durably."""
    model = load_model(folder)
    private_dir(layout.blobs)
    for part in parts(model):
        path = layout.blobs / part.sha256
        if not path.exists():
            write_durably(path, read_part(folder, part))
    sync_folder(layout.blobs)
    return model


def served_models(state: Path) -> list[dict[str, Any]]:
    """Name, version, manifest digest (hex) and number of experts of each model that a running gateway serves."""
    return Admin(state).call("GET", "/v1/admin/models")["models"]


def published_version(state: Path, name: str) -> tuple[int, str]:
    """The version of a model that a running gateway serves and its manifest's digest; 0 and "" for none."""
    return next(((m["version"], m["manifest"]) for m in served_models(state) if m["name"] == name), (0, ""))
