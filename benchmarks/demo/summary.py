"""The judgement at the end: what was claimed, what was found, and the one line for machines."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.demo.board import Board, Phase

ACCURACY_SLACK = 0.003
HARM = 0.05
# Attacks that an unverified fleet visibly suffers from; the others are caught all the same.
HARMFUL = ("collude", "random")


@dataclass(frozen=True)
class Check:
    """One claim of the demonstration and whether it held."""

    claim: str
    held: bool
    found: str


def checks(board: Board) -> list[Check]:
    """Every claim; all must hold."""
    clean, verified, unverified = board.clean or 0.0, board.verified.accuracy or 0.0, board.unverified.accuracy or 0.0
    out, liars = board.out_of_service(), set(board.liars)
    unanswered = [*board.unverified.failed, *board.verified.failed]
    found = [
        Check(
            "every request was answered",
            not unanswered and _whole(board.unverified) and _whole(board.verified),
            f"{len(unanswered)} failed" + (f": {unanswered[0]}" if unanswered else ""),
        ),
        Check(
            "verified answers are as accurate as the model itself",
            abs(verified - clean) <= ACCURACY_SLACK,
            f"{verified:.3f} against {clean:.3f}",
        ),
        Check("every liar is out of service", liars <= out, f"{len(liars & out)} of {len(liars)}"),
        Check("no honest agent is", not out - liars, f"{len(out - liars)} of {len(board.agents) - len(liars)}"),
        Check("an answer's receipt is accepted offline", board.audited, "accepted" if board.audited else "refused"),
        Check(
            "with one bit flipped it is refused",
            board.flipped_refused,
            "refused" if board.flipped_refused else "not refused",
        ),
    ]
    if board.attack in HARMFUL:
        worse = Check("unverified answers are visibly worse", clean - unverified >= HARM, f"{unverified:.3f}")
        found.insert(1, worse)
    return found


def _whole(phase: Phase) -> bool:
    return 0 < phase.rows == phase.total


def lines(board: Board) -> list[str]:
    """The closing summary, for people."""
    told = [f"{'ok  ' if c.held else 'FAIL'} {c.claim}: {c.found}" for c in checks(board)]
    for phase in (board.unverified, board.verified):
        if phase.rows:
            told.append(_figures(phase))
    told.append("liars: " + ", ".join(f"{name} {_standing(board, name)}" for name in board.liars))
    told.append("times: " + ", ".join(f"{step} {seconds} s" for step, seconds in board.times.items()))
    return told + board.usage


def last_line(board: Board) -> str:
    """The figures, for machines."""
    audited = "ok" if board.audited and board.flipped_refused else "failed"
    return (
        f"DEMO clean={board.clean or 0:.3f} verified={board.verified.accuracy or 0:.3f} "
        f"unverified={board.unverified.accuracy or 0:.3f} executions_per_task={board.executions_per_task:.2f} "
        f"caught={board.caught()}/{len(board.liars)} audited={audited}"
    )


def _figures(phase: Phase) -> str:
    ordered = sorted(phase.latencies_ms)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    return (
        f"{phase.name} (policy {phase.policy}): {phase.rows} windows in {phase.requests} requests, {phase.seconds:.1f} s, "
        f"{phase.rows / phase.seconds:.0f} windows/s, a request p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    )


def _standing(board: Board, name: str) -> str:
    return next((row["standing"] for row in board.agents if row["agent"] == name), "unknown")
