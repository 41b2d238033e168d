"""Finds the public test vectors, which are read where they lie and never copied in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "vectors"


def vectors(subfolder: str) -> Path:
    """The folder (or file) of that name under BMOE_VECTORS or ../shared/vectors; skips the test where it is absent."""
    path = Path(os.environ.get("BMOE_VECTORS") or _BESIDE_THE_CHECKOUT) / subfolder
    if not path.exists():
        pytest.skip(f"public vectors absent: {path} (set BMOE_VECTORS to the folder that holds them)")
    return path
