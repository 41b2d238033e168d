"""Quotas: what a tenant may have it gets, to the last request, and nobody pays for another's hunger."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import QuotaError, RefusedError
from coordinator.tenants import PUBLIC, Quotas, Tenant


def ask(quotas: Quotas, tenant: Tenant, now: float) -> None:
    with quotas.admitted(tenant, "wearable", now):
        pass


def test_the_public_asks_without_limit() -> None:
    quotas = Quotas()
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(quotas.admitted(PUBLIC, "anything", 0.0))
        one = Tenant("clinic", concurrent=1)
        stack.enter_context(quotas.admitted(one, "anything", 0.0))
        with pytest.raises(QuotaError, match="clinic has 1 requests in work"):
            ask(quotas, one, 0.0)
        ask(quotas, PUBLIC, 0.0)


def test_a_burst_is_spent_then_the_rate_holds_and_a_refusal_says_when_to_come_again() -> None:
    quotas, clinic = Quotas(), Tenant("clinic", rate=2, burst=3)
    for _ in range(3):
        ask(quotas, clinic, 100.0)
    with pytest.raises(QuotaError, match="more than 2 times a second") as refused:
        ask(quotas, clinic, 100.0)
    assert refused.value.retry_s == pytest.approx(0.5)
    ask(quotas, clinic, 100.0 + refused.value.retry_s)
    with pytest.raises(QuotaError):
        ask(quotas, clinic, 100.5)
    ask(quotas, Tenant("other", rate=2, burst=1), 100.5)


def test_places_are_given_back_when_a_request_ends_whichever_way() -> None:
    quotas, clinic = Quotas(), Tenant("clinic", concurrent=1)
    with quotas.admitted(clinic, "m", 0.0), pytest.raises(QuotaError, match="1 requests in work"):
        ask(quotas, clinic, 0.0)
    with contextlib.suppress(ValueError), quotas.admitted(clinic, "m", 0.0):
        raise ValueError
    ask(quotas, clinic, 0.0)


def test_a_model_that_is_not_allowed_costs_no_quota() -> None:
    quotas, narrow = Quotas(), Tenant("narrow", frozenset({"fashion"}), rate=0.001, burst=1)
    for _ in range(5):
        with pytest.raises(RefusedError, match="may not ask 'wearable', only fashion"):
            ask(quotas, narrow, 0.0)
    with quotas.admitted(narrow, "fashion", 0.0):
        pass


def test_limits_that_change_count_at_once() -> None:
    quotas = Quotas()
    ask(quotas, Tenant("a", rate=0.01, burst=1), 0.0)
    with pytest.raises(QuotaError):
        ask(quotas, Tenant("a", rate=0.01, burst=1), 1.0)
    ask(quotas, Tenant("a"), 1.0)


@given(st.lists(st.floats(0, 0.5), max_size=60), st.floats(0.5, 20), st.integers(1, 10))
def test_however_requests_come_no_more_pass_than_burst_and_rate_allow(
    pauses: list[float], rate: float, burst: int
) -> None:
    quotas, tenant, now, passed = Quotas(), Tenant("t", rate=rate, burst=burst), 0.0, 0
    for pause in pauses:
        now += pause
        with contextlib.suppress(QuotaError):
            ask(quotas, tenant, now)
            passed += 1
    assert passed <= burst + rate * now + 1e-6
