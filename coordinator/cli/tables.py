"""Rows on the operator's screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console()


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; all have the first one's keys."""
    if not rows:
        out.print("none")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(Text("" if v is None else str(v)) for v in row.values()))  # boards' words among it: no markup
    out.print(table)
