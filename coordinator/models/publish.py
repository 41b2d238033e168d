"""Publishing a model: its files staged by digest, its manifest given to the registrar, which enters the releases."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.files import sync_folder, write_durably
from bmoe.storage.manifest import MANIFEST_NAME, Model, load_model, parts, read_part
from bmoe.storage.origin import MAX_ORIGIN_BYTES, ORIGIN_NAME, check_origin, make_origin
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


def publish(
    state: Path, folder: Path, owner: str, hold: bool = False, origin: Path | None = None, to_sign: bool = False
) -> dict[str, Any]:
    """Stage the files of a model and have the registrar of a running gateway enter its releases.

    With `hold` a version that follows another is not in use before its rollout is done. `origin` is an in-toto statement,
    or a JSON object of the facts to make one of; `origin.json` in the folder when not given, if it is there.
    Returns the registrar's reply: model, version, whether it is final by now, and the ledger position, 0 where that
    version was there before; with `to_sign`, where keys kept elsewhere must sign first, their drafts alone.
    Raises ManifestError for a folder that is not what its manifest says, RefusedError as the registrar does.
    """
    layout = StateLayout(state)
    model = stage(layout, folder)
    statement = read_origin(folder, model, origin)
    digest = hashlib.sha256(statement).hexdigest()
    write_durably(layout.blobs / digest, statement)
    path = f"/v1/admin/releases?owner={owner}&origin={digest}{'&hold=true' if hold else ''}"
    path += "&to_sign=true" if to_sign else ""
    return Admin(state).call("POST", path, (folder / MANIFEST_NAME).read_bytes())


def read_origin(folder: Path, model: Model, given: Path | None) -> bytes:
    """The statement of origin of a model: the file's own, or made of the facts in it; raises InputError."""
    path = given or folder / ORIGIN_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if given is not None:
            raise InputError(f"{path}: there is no such file") from None
        return make_origin(model, {})
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_ORIGIN_BYTES:
        raise InputError(f"{path} has {len(data)} bytes, at most {MAX_ORIGIN_BYTES} do")
    try:
        facts = json.loads(data)
        if isinstance(facts, dict) and "_type" not in facts:
            return make_origin(model, facts)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    check_origin(data, model)
    return data


def stage(layout: StateLayout, folder: Path) -> Model:
    """Put every file of a model where agents fetch it from, under its digest, durably."""
    model = load_model(folder)
    private_dir(layout.blobs)
    for part in parts(model):
        path, data = layout.blobs / part.sha256, read_part(folder, part)
        # One that is there may be damaged: what is published is what was read.
        if not path.is_file() or path.stat().st_size != part.bytes or path.read_bytes() != data:
            write_durably(path, data)
    sync_folder(layout.blobs)
    return model


def served_models(state: Path) -> list[dict[str, Any]]:
    """Name, version, manifest digest (hex) and number of experts of each model that a running gateway serves."""
    return Admin(state).call("GET", "/v1/admin/models")["models"]


def published_version(state: Path, name: str) -> tuple[int, str]:
    """The version of a model that a running gateway serves and its manifest's digest; 0 and "" for none."""
    return next(((m["version"], m["manifest"]) for m in served_models(state) if m["name"] == name), (0, ""))
