"""Tests of whole boards. One module, one board; its tests in the order that they stand in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.emulate.sysroot import foreign_wheels, recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from debian import PYTHON
from image import make_images


@pytest.fixture(scope="session")
def images() -> Path:
    """The folder of vendors' images."""
    return make_images()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a board without a package index: the aarch64 wheels that an agent needs, and pip's. Our own `bmoe flash` brings."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    subprocess.run(
        [*pip, *foreign_wheels(PYTHON), "--dest", str(folder), "pip", *recipe().requirements], check=True, timeout=600
    )
    return folder
