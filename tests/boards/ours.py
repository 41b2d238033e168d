"""Our own wheel, built from a copy, so that nothing is left in the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("bmoe", "coordinator", "edge_agent", "models", "firmware_configs")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def build_wheel(into: Path) -> Path:
    """The wheel of this checkout, in `into`."""
    source = into / "source"
    for name in PARTS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(into), str(source)],
        check=True, timeout=300,
    )  # fmt: skip
    shutil.rmtree(source)
    return next(into.glob("bmoe-*.whl"))
