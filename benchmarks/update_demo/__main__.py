"""`python -m benchmarks.update_demo`: ten agents under load get a better expert over Flower; three broken releases stop.

Exit status: 0 when every claim held, 1 when one did not or something failed, 2 for wrong arguments, 130 at Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import run_command
from benchmarks.demo.windows import MODEL
from benchmarks.fleet import LocalFleet, specs
from benchmarks.update_demo import releases
from benchmarks.update_demo.load import Load
from bmoe.protocol.errors import UnavailableError
from coordinator.flower.layout import has_flower
from coordinator.models.publish import publish
from coordinator.rollout.machine import ENDED, UNDER_WAY

OWNER = "bmoe"
LOOK_S = 0.5
ROLLOUT_S = 900.0
BEFORE_S = 8.0
# Judged by what the canaries do with copies of clients' requests; a two-core machine's own noise is no harm.
PLAN: dict[str, Any] = {
    "canary_count": 1, "share": 0.3, "soak_s": 3.0,
    "limits": {"tasks": 12, "latency": 5.0, "latency_s": 0.5, "disagreement": 0.6},
}  # fmt: skip


@dataclass
class Story:
    """What has happened so far, told as it happens."""

    began: float = field(default_factory=time.monotonic)
    held: list[tuple[bool, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """One line with the time."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def claim(self, holds: bool, text: str) -> bool:
        """One line with whether it held."""
        self.held.append((holds, text))
        self.say(f"{'ok   ' if holds else 'FAULT'} {text}")
        return holds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.update_demo", description=__doc__)
    made.add_argument("--agents", type=int, default=10)
    made.add_argument("--per-second", type=float, default=12.0, help="requests of clients")
    made.add_argument("--connections", type=int, default=4)
    made.add_argument("--rows", type=int, default=4, help="windows in one request")
    made.add_argument("--over", choices=("auto", "https"), default="auto")
    made.add_argument("--seed", type=int, default=7, help="draws the noise of the early version's weights")
    made.add_argument("--keep", action="store_true", help="do not remove the temporary folder")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; the exit status tells the truth."""
    given = parser().parse_args(argv)
    if not (2 <= given.agents <= 64 and 0.1 <= given.per_second <= 1000 and 1 <= given.rows <= 64):
        print("update_demo: expected 2..64 agents, 0.1..1000 requests a second, 1..64 rows", file=sys.stderr)
        return 2
    if given.over == "auto" and not has_flower():
        print("update_demo: flwr is not installed: pip install 'bmoe[federation]', or --over https", file=sys.stderr)
        return 2
    return run_command("update_demo", lambda: _run(given))


async def _run(given: argparse.Namespace) -> int:
    root = Path(tempfile.mkdtemp(prefix="bmoe-update-"))
    story = Story()
    try:
        line = await _tell(given, root, story)
    except BaseException:
        given.keep = True
        print(f"update_demo: logs are under {root}", file=sys.stderr)
        raise
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)
    print(line)
    return 0 if all(held for held, _ in story.held) else 1


async def _tell(given: argparse.Namespace, root: Path, story: Story) -> str:
    story.say("making the releases")
    first = await asyncio.to_thread(releases.early, root, given.seed)
    flags = ("--model", str(first))
    async with LocalFleet(root, specs(given.agents), gateway_flags=flags) as fleet:
        await fleet.start()
        story.say(f"{given.agents} agents are online")
        load = Load(fleet.url, given.connections, given.per_second, given.rows)
        await asyncio.to_thread(load.start)
        try:
            await asyncio.sleep(BEFORE_S)
            story.claim(load.served(1) > 0, f"version 1 serves, {100 * load.accuracy(1):.0f} % right")
            await _good(given, fleet, root, load, story)
            stopped = [
                await _bad(given, fleet, root, name, make, load, story) for name, make in releases.BROKEN.items()
            ]
        finally:
            await asyncio.to_thread(load.stop)
        story.claim(
            load.failed == 0, f"{len(load.seen)} requests answered, {load.failed} failed {list(load.failures)[:2]}"
        )
        before, after = load.accuracy(1), load.accuracy(2)
        story.claim(after > before, f"version 2 is right in {100 * after:.1f} %, version 1 was in {100 * before:.1f} %")
    return (
        f"UPDATE failed_requests={load.failed} accuracy_before={before:.3f} accuracy_after={after:.3f}"
        f" bad_releases_stopped={sum(stopped)}/{len(stopped)}"
    )


async def _good(given: argparse.Namespace, fleet: LocalFleet, root: Path, load: Load, story: Story) -> None:
    folder = await asyncio.to_thread(releases.better, root)
    row = await _roll_out(given, fleet, folder, story)
    story.claim(row["stage"] == "done", f"version 2 is {row['stage']}: {row['reason']}")
    carriers = await asyncio.to_thread(_carriers, fleet, 2)
    wanted = "https" if given.over == "https" else "flower"
    story.claim(set(carriers) == {wanted}, f"it came to {len(carriers)} agents over {', '.join(sorted(set(carriers)))}")
    served = load.served(2)
    await asyncio.sleep(BEFORE_S)
    story.claim(load.served(2) > served, f"version 2 has answered {load.served(2)} rows")


async def _bad(
    given: argparse.Namespace, fleet: LocalFleet, root: Path, name: str, make: Callable[[Path], Path], load: Load,
    story: Story,
) -> bool:  # fmt: skip
    folder = await asyncio.to_thread(make, root)
    row = await _roll_out(given, fleet, folder, story)
    stopped = row["stage"] == "rolled-back" and len(row["wave"]) == PLAN["canary_count"] and row["in_use"] == 2
    unseen = load.served(row["version"]) == 0
    return story.claim(
        stopped and unseen, f"{name}: {row['stage']} at the canary, nobody was answered by it: {row['reason']}"
    )


async def _roll_out(given: argparse.Namespace, fleet: LocalFleet, folder: Path, story: Story) -> dict[str, Any]:
    """Publish a version, held, and roll it out; its row once it has ended."""
    reply = await asyncio.to_thread(publish, fleet.state, folder, OWNER, True)
    client = fleet.client()
    await asyncio.to_thread(client.start_rollout, MODEL, reply["version"], {**PLAN, "over": given.over})
    story.say(f"version {reply['version']} ({folder.name}) is published and on its way")
    told, deadline = "", time.monotonic() + ROLLOUT_S
    while time.monotonic() < deadline:
        if fleet.failed.done():
            fleet.failed.result()
        row = next(row for row in await asyncio.to_thread(client.rollouts) if row["model"] == MODEL)
        text = f"{row['stage']}: {len(row.get('holds', ()))} of {len(row['wave'])} agents hold it"
        if text != told and row["wave"] and row["stage"] in UNDER_WAY:
            story.say(f"  {text}")
            told = text
        if row["stage"] in ENDED:
            client.close()
            return dict(row)
        await asyncio.sleep(LOOK_S)
    raise UnavailableError(f"the rollout has not ended within {ROLLOUT_S:g} s; it stands at {row}")


def _carriers(fleet: LocalFleet, version: int) -> list[str]:
    """Over what each agent says it got a version, from its log."""
    found = []
    for spec in fleet.agents:
        for line in fleet.log(spec.name).read_text(errors="replace").splitlines():
            if "event=update_begins" in line and f"version={version} " in line:
                found.append(line.rsplit("carrier=", 1)[1].split()[0])
    return found


if __name__ == "__main__":
    sys.exit(main())
