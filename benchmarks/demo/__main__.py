"""`python -m benchmarks.demo`: ten agents, three of them lying, answer real inputs; one answer is checked offline.

Exit status: 0 when every claim held, 1 when one did not or something failed, 2 for wrong arguments, 130 at Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.command import run_command
from benchmarks.demo import summary
from benchmarks.demo.board import Board
from benchmarks.demo.steps import Plan, demonstrate, until_failure
from benchmarks.demo.view import showing
from benchmarks.dishonest import TWISTS
from benchmarks.fleet import LocalFleet, specs
from bmoe.protocol.errors import BmoeError, ConfigError

UNVERIFIED_ROWS = 480


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    made.add_argument("--seed", type=int, help="draws the liars, their lies, the order and the flipped bit")
    made.add_argument("--agents", type=int, default=10)
    made.add_argument("--liars", type=int, default=3)
    made.add_argument("--attack", choices=(*TWISTS, "equivocate"), default="collude")
    made.add_argument("--broker", choices=("nats", "mosquitto"), default="nats", help="what carries the messages")
    made.add_argument("--requests-rows", type=int, default=16, metavar="N", help="windows in one request")
    made.add_argument("--state", type=Path, help="an empty or new folder to work in; it is kept")
    made.add_argument("--keep", action="store_true", help="do not remove the temporary folder")
    made.add_argument("--plain", action="store_true", help="lines instead of a live view")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; the exit status tells the truth."""
    given = parser().parse_args(argv)
    if not (1 <= given.liars < given.agents <= 64 and 1 <= given.requests_rows <= 256):
        print("demo: expected 1 <= liars < agents <= 64 and 1 <= requests-rows <= 256", file=sys.stderr)
        return 2
    return run_command("demo", lambda: _run(given))


async def _run(given: argparse.Namespace) -> int:
    seed = secrets.randbits(32) if given.seed is None else given.seed
    dice = random.Random(seed)
    liars = set(dice.sample(range(given.agents), given.liars))
    agents = specs(given.agents, liars, given.attack, seed)
    board = Board(seed, given.attack, tuple(spec.name for spec in agents if spec.attack))
    plan = Plan(given.requests_rows, UNVERIFIED_ROWS, given.plain or not sys.stdout.isatty())
    print(
        f"seed {seed} (repeat with --seed {seed}); liars: {', '.join(board.liars)}; attack: {given.attack}", flush=True
    )
    with _folder(given) as root:
        try:
            async with LocalFleet(root, agents, broker=given.broker) as fleet:
                with showing(board, Console(), plan.plain):
                    await until_failure(fleet, demonstrate(plan, board, fleet, dice))
        except BmoeError as error:
            given.keep = True
            print(f"demo: {board.step or 'failed'}: {error}\ndemo: logs are under {root}", file=sys.stderr)
            return 1
        held = all(check.held for check in summary.checks(board))
        given.keep = given.keep or not held
        print("\n".join(summary.lines(board)))
        if given.keep:
            print(f"logs, state and receipts are under {root}")
    print(summary.last_line(board))
    return 0 if held else 1


@contextlib.contextmanager
def _folder(given: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The folder to work in; a temporary one is removed at the end unless it is needed to look at."""
    if given.state is not None:
        root = given.state.resolve()
        if root.exists() and any(root.iterdir()):
            raise ConfigError(f"{root} is not empty: a fleet whose liars are known proves nothing; give a new folder")
        root.mkdir(parents=True, exist_ok=True)
        given.keep = True
        yield root
        return
    root = Path(tempfile.mkdtemp(prefix="bmoe-demo-"))
    try:
        yield root
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
