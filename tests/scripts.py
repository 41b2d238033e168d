"""Modules that no package holds: scripts and examples, loaded from their files as tests need them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def by_path(path: Path) -> ModuleType:
    """The module in a file, under a name that its folder makes its own."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
