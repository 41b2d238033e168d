"""Makes the helpers of the tests importable from every folder of tests, whichever is run."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("", "unit", "integration", "fuzz", "flower"):
    path = str(Path(__file__).parent / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
