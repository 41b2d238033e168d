"""How many validators' word is enough; by itself, so that whoever only counts them loads nothing else."""

from __future__ import annotations


def quorum_of(validators: int) -> int:
    """How many validators' word makes a size final: floor(2N/3) + 1."""
    return 2 * validators // 3 + 1
