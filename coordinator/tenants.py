"""Tenants: who may ask for what, and how much of it. Pure but for what it counts; the time is an argument.

A tenant is named by an API token, or, for requests over MQTT, by the owner in a device's enrolment. Its name stands in
every verdict and answer made for it, and rows of two tenants never share a task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from bmoe.protocol.errors import QuotaError, RefusedError


@dataclass(frozen=True)
class Tenant:
    """What one tenant may have. None and 0 mean without limit; `rate` is requests a second.

    `burst` is how many may come at once beyond it, 0 as many as come in a second.
    """

    name: str
    models: frozenset[str] | None = None
    rate: float = 0.0
    burst: int = 0
    concurrent: int = 0


PUBLIC = Tenant("public")


@dataclass
class _Use:
    """What a tenant has used: a token bucket (RFC 2697 calls it a meter), and the requests in work."""

    level: float
    at: float
    running: int = 0


class Quotas:
    """Counts what each tenant uses. One instance a gateway."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    @contextlib.contextmanager
    def admitted(self, tenant: Tenant, model: str, now: float) -> Iterator[None]:
        """A place for one request. Raises RefusedError for a model it may not ask, QuotaError when it asks too much."""
        check_model(tenant, model)
        burst = tenant.burst or max(1.0, tenant.rate)
        use = self._uses.setdefault(tenant.name, _Use(burst, now))
        if tenant.concurrent and use.running >= tenant.concurrent:
            raise QuotaError(f"tenant {tenant.name} has {use.running} requests in work, the limit: wait for one to end")
        if tenant.rate:
            use.level = min(burst, use.level + max(0.0, now - use.at) * tenant.rate)
            use.at = now
            if use.level < 1:
                wait_s = (1 - use.level) / tenant.rate
                raise QuotaError(
                    f"tenant {tenant.name} asks more than {tenant.rate:g} times a second: again in {wait_s:.2g} s",
                    wait_s,
                )
            use.level -= 1
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1


def check_model(tenant: Tenant, model: str) -> None:
    """Raise RefusedError for a model that the tenant may not ask."""
    if tenant.models is not None and model not in tenant.models:
        only = ", ".join(sorted(tenant.models)) or "none"
        raise RefusedError(f"tenant {tenant.name} may not ask {model[:64]!r}, only {only}")
