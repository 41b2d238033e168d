"""Experts give the same on x86 and on every board, or nearly so: what the tolerances of manifests rest on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from drift_table import BOARDS, HERE, KEPT, SATURATING, Row, kept_classes, measure, rendered

from coordinator.emulate.board import EmulatedBoard

Measured = tuple[list[Row], dict[str, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def measured(emulated_board: Callable[[str], EmulatedBoard], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure([emulated_board(name) for name in BOARDS], tmp_path_factory.mktemp("drift"))


def test_int8_is_equal_bit_for_bit_on_every_processor(measured: Measured) -> None:
    rows = [row for row in measured[0] if row.sample.int8 and row.processor != SATURATING]
    assert len(rows) == 2 * len(BOARDS)
    assert [row for row in rows if row.kind != "equal"] == []


def test_fp32_differs_by_rounding_alone(measured: Measured) -> None:
    rows = [row for row in measured[0] if not row.sample.int8]
    assert len(rows) == 3 * len(BOARDS)
    assert [row for row in rows if row.kind == "apart" or row.drift.argmax < 1.0] == []
    assert any(row.kind == "near" for row in rows), f"{HERE} and the boards agree bit for bit: one of them is not run"


def test_the_boards_agree_bit_for_bit_with_each_other(measured: Measured) -> None:
    first, *others = [outputs for processor, outputs in measured[1].items() if processor != SATURATING]
    for other in others:
        assert {name for name in first if first[name].tobytes() != other[name].tobytes()} == set()


def test_the_kept_document_is_as_make_drift_writes_it() -> None:
    empty, kept = rendered([], "QEMU"), KEPT.read_text(encoding="utf-8")
    head, tail = empty.split("\n\nMeasured on ")
    assert kept.startswith(head) and kept.endswith(tail.split(" and QEMU.")[1]), "never edit it: run `make drift`"


def test_the_kept_table_has_the_same_classes(measured: Measured) -> None:
    """What the processor of this machine decides alone, another machine may see otherwise: fp32 equal or near."""
    kept = kept_classes()
    now = {(row.sample.title, row.processor): row.kind for row in measured[0]}
    assert now.keys() == kept.keys(), "run `make drift`"
    moved = {
        key: (kept[key], kind)
        for key, kind in now.items()
        if key[1] != SATURATING and kind != kept[key] and {kind, kept[key]} != {"equal", "near"}
    }
    assert not moved
