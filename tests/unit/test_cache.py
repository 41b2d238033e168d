"""The result cache: only what is alike in everything serves for another, and nothing is kept beyond its bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from test_intake import GOOD, TOY, _take

from bmoe.ledger.rules.combine import Choices
from bmoe.protocol.tensors import Tensor
from coordinator.cache import KEPT_S, Cache, Combined, key_of
from coordinator.jobs import Accepted, Request


def request(**changes: Any) -> Request:
    return dataclasses.replace(_take({"inputs": [GOOD]}), **changes)


def combined(size: int = 8) -> Combined:
    one = np.zeros((1, 1), "<u2")
    value = (Tensor("y", "uint8", (size,), bytes(size)),)
    return Combined(Choices(one, one.astype("<f4"), one, one), (Accepted(bytes(16), value, bytes(size)),), value)


def test_two_requests_alike_share_a_key_whoever_sent_them_first() -> None:
    assert key_of(request()) == key_of(request(id=bytes(16), client_id="other", wait="final", received_ms=9))


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "other"},
        {"policy": "full"},
        {"tensors": (Tensor("x", "float32", (2, 2), bytes(16)),)},
        {"tensors": (Tensor("x", "float32", (1, 4), request().tensors[0].data),)},
        {"model": dataclasses.replace(TOY, statement=dataclasses.replace(TOY.statement, manifest=bytes([1] * 32)))},
    ],
)
def test_whatever_could_change_the_answer_changes_the_key(changes: dict[str, Any]) -> None:
    """One tenant must not learn from its own speed what another has asked."""
    assert key_of(request(**changes)) != key_of(request())


def test_a_result_serves_for_a_while_and_a_refutation_forgets_all() -> None:
    cache = Cache()
    cache.put(b"a", combined(), 0.0)
    assert cache.get(b"a", KEPT_S) is not None and cache.get(b"b", 0.0) is None
    assert cache.get(b"a", KEPT_S + 1) is None and cache.get(b"a", 0.0) is None, "too old is gone"
    cache.put(b"a", combined(), 0.0)
    cache.clear()
    assert cache.get(b"a", 0.0) is None and cache.hits == 1
    cache.put(b"a", combined(), 0.0, generation=0)
    assert cache.get(b"a", 0.0) is None, "it was under way when all was forgotten"


def test_number_and_bytes_are_bounded_the_oldest_make_room() -> None:
    cache = Cache(entries=3, size=1000)
    for key in (b"a", b"b", b"c", b"d"):
        cache.put(key, combined(), 0.0)
    assert [cache.get(k, 0.0) is not None for k in (b"a", b"b", b"c", b"d")] == [False, True, True, True]
    cache.put(b"e", combined(300), 0.0)
    assert [cache.get(k, 0.0) is not None for k in (b"b", b"c", b"d", b"e")] == [False, True, True, True]
    cache.put(b"f", combined(400), 0.0)
    assert [cache.get(k, 0.0) is None for k in (b"b", b"c", b"d", b"e", b"f")] == [True] * 5, "none larger than all"
