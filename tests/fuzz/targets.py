"""Every decoder of bytes from outside, by name: what the unit tests spoil by chance and `make fuzz` by coverage."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parent / "unit", HERE.parent / "golden", HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import targets_board  # noqa: E402
import targets_gateway  # noqa: E402
import targets_images  # noqa: E402
import targets_ledger  # noqa: E402
import targets_releases  # noqa: E402
import targets_wire  # noqa: E402
from target import Target  # noqa: E402

GROUPS = (targets_wire, targets_ledger, targets_gateway, targets_board, targets_images, targets_releases)
TARGETS: dict[str, Target] = {t.name: t for group in GROUPS for t in group.TARGETS}
