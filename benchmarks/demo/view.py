"""What one sees: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks.demo.board import Board, Phase

EVENTS_SHOWN = 8
REFRESH_PER_S = 4
STYLES = {"trusted": "green", "probation": "", "doubted": "yellow", "quarantined": "red", "revoked": "bold red"}


@contextlib.contextmanager
def showing(board: Board, console: Console, plain: bool) -> Iterator[None]:
    """Show the board until the block ends; `board.say` goes to the screen."""
    if plain or not console.is_terminal:
        board.say = lambda line: print(f"{_elapsed(board)} {line}", flush=True)
        yield
        return
    events: deque[str] = deque(maxlen=EVENTS_SHOWN)
    board.say = lambda line: events.append(f"{_elapsed(board)} {line}")
    with Live(console=console, refresh_per_second=REFRESH_PER_S, get_renderable=lambda: _screen(board, list(events))):
        yield
    board.say = print


def progress_line(board: Board) -> str:
    """The state in one line, for plain output."""
    phase = board.verified if board.verified.began else board.unverified
    ledger = board.statistics.get("ledger", {})
    parts = [_phase_text(phase)] if phase.began else []
    parts.append(f"caught {board.caught()}/{len(board.liars)}")
    parts.append(f"ledger {ledger.get('size', 0)} entries, {ledger.get('final', 0)} final")
    return "; ".join(parts)


def _phase_text(phase: Phase) -> str:
    accuracy = "-" if phase.accuracy is None else f"{phase.accuracy:.3f}"
    return f"{phase.name} {phase.rows}/{phase.total} windows, accuracy {accuracy}, {_rate(phase)} windows/s"


def _rate(phase: Phase) -> str:
    return f"{phase.rows / phase.seconds:.0f}" if phase.seconds > 0 else "0"


def _elapsed(board: Board) -> str:
    return f"{time.monotonic() - board.began:5.1f}s"


def _screen(board: Board, events: list[str]) -> RenderableType:
    title = Text(f"bmoe demo  seed {board.seed}  {_elapsed(board).strip()}  {board.step}", style="bold")
    return Group(title, _phases(board), _agents(board), _ledger(board), Text("\n".join(events), style="dim"))


def _phases(board: Board) -> Table:
    table = Table("", "policy", "windows", "windows/s", "accuracy")
    clean = "measuring" if board.clean is None else f"{board.clean:.3f}"
    table.add_row("clean, no network", "-", "", "", clean)
    for phase in (board.unverified, board.verified):
        accuracy = "-" if phase.accuracy is None else f"{phase.accuracy:.3f}"
        table.add_row(phase.name, phase.policy, f"{phase.rows}/{phase.total or '-'}", _rate(phase), accuracy)
    return table


def _agents(board: Board) -> Table:
    table = Table("agent", "owner", "in truth", "standing", "online", "clean", "refuted", "in work")
    for row in board.agents:
        lies = row["agent"] in board.liars
        table.add_row(
            row["agent"], row["owner"],
            Text("liar", "red") if lies else Text("honest"),
            Text(row["standing"], STYLES.get(row["standing"], "")),
            "yes" if row["online"] else "no",
            str(row["clean"]), str(row["refutations"]), str(row["load"]),
        )  # fmt: skip
    return table


def _ledger(board: Board) -> Text:
    s = board.statistics
    ledger = s.get("ledger", {})
    standing = [row["standing"] for row in board.agents]
    return Text(
        f"ledger {ledger.get('size', 0)} entries, {ledger.get('final', 0)} final   "
        f"tasks {s.get('tasks', 0)}   outputs {s.get('outputs', 0)}   "
        f"re-executed by the referee {s.get('referee_executions', 0)}   hedged {s.get('hedges', 0)}   "
        f"quarantined {standing.count('quarantined')}, revoked {standing.count('revoked')}"
    )
