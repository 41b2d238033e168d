"""Hostile bytes for every decoder: each is refused with its one kind of error, or read and spelled again the same.

The decoders, with honest inputs to spoil, are those that `make fuzz` strikes with coverage: see tests/fuzz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
from targets import TARGETS

NAMES = sorted(TARGETS)
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_honest_is_taken(name: str) -> None:
    target = TARGETS[name]
    assert target.honest and any([target.strike(data) for data in target.honest])


@pytest.mark.parametrize("name", NAMES)
@FAST
@given(numbers=st.lists(st.integers(0, 2**32), min_size=1, max_size=5), noise=st.binary(max_size=80))
def test_hostile_bytes_meet_one_error_or_are_spelled_again_the_same(
    name: str, numbers: list[int], noise: bytes
) -> None:
    target = TARGETS[name]
    target.strike(noise)
    for number in numbers:
        target.strike(target.hostile(number))
