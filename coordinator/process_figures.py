"""What `bmoe up` knows of the processes that it watches, in figures for the coordinator's /metrics."""

from __future__ import annotations

from collections import Counter

from bmoe.protocol.figures import Figures
from coordinator.embedded.supervisor import Event


class ProcessFigures:
    """How often each process was started, and whether it is ready now."""

    def __init__(self) -> None:
        self._starts: Counter[str] = Counter()
        self._up: dict[str, int] = {}

    def note(self, event: Event) -> None:
        """Count what the supervisor tells."""
        if event.kind == "started":
            self._starts[event.child] += 1
            self._up[event.child] = 0
        elif event.kind in ("ready", "exited"):
            self._up[event.child] = int(event.kind == "ready")

    def figures(self) -> Figures:
        """By "starts NAME" and "up NAME"."""
        starts = {f"starts {name}": float(count) for name, count in self._starts.items()}
        return starts | {f"up {name}": float(ready) for name, ready in self._up.items()}
