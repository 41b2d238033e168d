"""The one expert that everybody serves: expert-0 of the built-in model, as a model without a gate for us."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bmoe.storage.packaged import packaged

NAME = "expert"
SOURCE = "wearable"


def single_expert(folder: Path) -> Path:
    """Write a model of one expert and no gate to `folder`; the path of its ONNX file."""
    source = packaged("models", SOURCE)
    manifest = json.loads((source / "model.json").read_bytes())
    expert = manifest["experts"][0]
    manifest |= {"name": NAME, "gate": None, "experts": [expert], "top_k": 1, "description": f"One expert of {SOURCE}."}
    folder.mkdir(parents=True)
    for file in (expert["file"], expert["golden"]["file"]):
        shutil.copy(source / file, folder / file)
    (folder / "model.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return folder / expert["file"]
