"""Hostile bytes for every decoder: each is refused with its one kind of error, or read and spelled again the same.

The decoders, with honest inputs to spoil, are those that `make fuzz` strikes with coverage: see tests/fuzz.
"""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
from targets import TARGETS

NAMES = sorted(TARGETS)
FAST = settings(max_examples=15, deadline=None)
# What breaks decoders of any format: deep nesting, endless numbers, lengths that lie, text that is none.
NOTORIOUS = (
    b"", b"\x00", b"\n\n", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\x81" * 100_000, b"9" * 50_000,
    b"-" + b"9" * 5000, b"1e999", b'"\\ud800"', b"{}", b"[]", b"\x9b" + b"\xff" * 8, b"\x5a\xff\xff\xff\xff",
    b"\xbb" + b"\xff" * 8, b"a = " + b"[" * 50_000, b"\xd2\x84" + b"\x5a\xff\xff\xff\xff",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_honest_is_taken(name: str) -> None:
    target = TARGETS[name]
    assert target.honest and any([target.strike(data) for data in target.honest])


@pytest.mark.parametrize("name", NAMES)
def test_what_breaks_other_decoders_is_refused_within_its_bound_of_memory(name: str) -> None:
    target = TARGETS[name]
    for data in NOTORIOUS:
        tracemalloc.start()
        try:
            target.strike(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < target.memory + 4 * len(data), f"{data[:20]!r} took {peak} bytes"


@pytest.mark.parametrize("name", NAMES)
@FAST
@given(numbers=st.lists(st.integers(0, 2**32), min_size=1, max_size=5), noise=st.binary(max_size=80))
def test_hostile_bytes_meet_one_error_or_are_spelled_again_the_same(
    name: str, numbers: list[int], noise: bytes
) -> None:
    target = TARGETS[name]
    for data in (noise, *map(target.hostile, numbers)):
        taken = target.strike(data)  # raises for any other error, and for what is taken and spelled otherwise
        assert target.strike(data) is taken, "what was taken or refused once is so again"


def test_every_decoder_stands_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "hostile_input.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []
