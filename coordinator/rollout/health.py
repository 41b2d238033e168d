"""Is a new version doing harm? Its figures beside those of the version in use, over the same requests. Pure."""

from __future__ import annotations

from dataclasses import dataclass

LATENCIES_KEPT = 512


@dataclass(frozen=True)
class Limits:
    """What a new version may do worse than the one in use before it is rolled back.

    `tasks` are needed for a judgement. `dissent` and `failures` are by how much these shares may be larger. `latency`
    is how many times as long an agent may take (95th percentile), differences below `latency_s` being none.
    `disagreement` is the largest share of rows for which the two versions may give another answer to the same request.
    """

    tasks: int = 20
    dissent: float = 0.05
    failures: float = 0.05
    latency: float = 2.0
    latency_s: float = 0.05
    disagreement: float = 0.3


@dataclass(frozen=True)
class Figures:
    """What was seen of one version: of its tasks, the outputs to them, and its trials against the version in use."""

    tasks: int = 0
    failed: int = 0
    outputs: int = 0
    dissent: int = 0
    seconds: tuple[float, ...] = ()
    rows: int = 0
    differing: int = 0

    @property
    def p95_s(self) -> float:
        """The 95th percentile of how long agents took, in seconds; 0 while nobody has answered."""
        known = sorted(self.seconds)
        return known[int(0.95 * (len(known) - 1))] if known else 0.0

    def plus(
        self, *, failed: bool = False, outputs: int = 0, dissent: int = 0, seconds: tuple[float, ...] = ()
    ) -> Figures:
        """With one task more."""
        kept = (*self.seconds, *seconds)[-LATENCIES_KEPT:]
        return Figures(
            self.tasks + 1, self.failed + failed, self.outputs + outputs, self.dissent + dissent, kept, self.rows,
            self.differing,
        )  # fmt: skip

    def compared(self, rows: int, differing: int) -> Figures:
        """With one trial more."""
        return Figures(
            self.tasks, self.failed, self.outputs, self.dissent, self.seconds, self.rows + rows,
            self.differing + differing,
        )  # fmt: skip


def harm(new: Figures, used: Figures, limits: Limits) -> str:
    """What the new version does worse than is allowed, in words; empty while nothing is known against it."""
    if new.tasks < limits.tasks:
        return ""
    checks = (
        ("outputs dissent", _share(new.dissent, new.outputs), _share(used.dissent, used.outputs) + limits.dissent),
        (
            "tasks end without a verdict",
            _share(new.failed, new.tasks),
            _share(used.failed, used.tasks) + limits.failures,
        ),
        ("answers differ from those of the version in use", _share(new.differing, new.rows), limits.disagreement),
    )
    for what, found, allowed in checks:
        if found > allowed:
            return f"{100 * found:.0f} % of its {what}, at most {100 * allowed:.0f} % may ({new.tasks} tasks)"
    slow = max(limits.latency * used.p95_s, used.p95_s + limits.latency_s)
    if used.seconds and new.p95_s > slow:
        return (
            f"agents take {1000 * new.p95_s:.0f} ms for it (95th percentile), {1000 * used.p95_s:.0f} ms for the version"
            f" in use; at most {1000 * slow:.0f} ms may be ({new.tasks} tasks)"
        )
    return ""


def known_well(new: Figures, limits: Limits) -> bool:
    """Whether enough was seen of the new version to judge it."""
    return new.tasks >= limits.tasks


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
