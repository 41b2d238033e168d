"""What the coordinator counts of requests while it serves them; coordinator/metrics.py shows it to Prometheus."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from bmoe.protocol.figures import Seconds

TENANTS_MAX = 100
OTHER = "other"
OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (RefusedError, "refused"),
    (InputError, "bad_request"),
    (UnavailableError, "unavailable"),
    (BmoeError, "failed"),
    (Exception, "fault"),
    (BaseException, "cancelled"),
)
P = ParamSpec("P")
T = TypeVar("T")


class RequestCounts:
    """Requests by (model, tenant, outcome), and how long those answered took, by model.

    Labels are bounded: a model is one that is served, and of tenants only the first hundred go by their own name.
    """

    def __init__(self, models: Callable[[], list[str]]) -> None:
        self._models = models
        self._tenants: set[str] = set()
        self.by: Counter[tuple[str, str, str]] = Counter()
        self.seconds: dict[str, Seconds] = {}
        self.http_errors: Counter[int] = Counter()

    def answered(self, model: str, tenant: str, seconds: float) -> None:
        """Count a request that has its answer."""
        self.by[model, self._tenant(tenant), "answered"] += 1
        self.seconds.setdefault(model, Seconds()).add(seconds)

    def failed(self, model: str, tenant: str, error: BaseException) -> None:
        """Count a request that has none."""
        known = model if model in self._models() else OTHER
        self.by[known, self._tenant(tenant), outcome_of(error)] += 1

    def _tenant(self, name: str) -> str:
        if name not in self._tenants:
            if len(self._tenants) >= TENANTS_MAX:
                return OTHER
            self._tenants.add(name)
        return name


class Counting(Protocol):
    """What has request counts."""

    counts: RequestCounts


S = TypeVar("S", bound=Counting)


def counted(
    infer: Callable[Concatenate[S, str, Any, str, P], Awaitable[T]],
) -> Callable[Concatenate[S, str, Any, str, P], Awaitable[T]]:
    """Count the calls of a method infer(self, model, body, tenant, ...) with their outcome and duration."""

    @functools.wraps(infer)
    async def counting(self: S, model: str, body: Any, tenant: str, *args: P.args, **kwargs: P.kwargs) -> T:
        """Count a request in, and out by what became of it."""
        began = time.perf_counter()
        try:
            answered = await infer(self, model, body, tenant, *args, **kwargs)
        except BaseException as error:
            self.counts.failed(model, tenant, error)
            raise
        self.counts.answered(model, tenant, time.perf_counter() - began)
        return answered

    return counting


def outcome_of(error: BaseException) -> str:
    """The word for a failure."""
    return next(word for kind, word in OUTCOMES if isinstance(error, kind))
