"""What both boot tests share: a gateway of this machine, a card, the board that it is put into, and the command line."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
from image import BOOT_MB, MIB, START_MB
from machine import HOST, Machine

from bmoe.client import Answer, Client
from coordinator.embedded.ports import read_ports
from coordinator.emulate.fleet import COMMANDS, Fleet

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = np.random.default_rng(5).standard_normal((4, 6, 100)).astype(np.float32)
# This machine's network has no address that a board inside QEMU reaches but its loopback, by another name.
GATEWAY_SETTINGS = {"BMOE_PUBLIC_HOSTS": f'["{HOST}"]'}


class Deployment:
    """The gateway, the card, and the board that it is put into, by its name in the fleet."""

    def __init__(self, root: Path, fleet: Fleet, name: str, board: Machine) -> None:
        self.root, self.fleet, self.name, self.board = root, fleet, name, board
        self.card, self.token = card_of(root), ""
        self.times: dict[str, float] = {}

    def until_online(self, wanted: bool, within_s: float) -> float:
        """Wait until the gateway holds the board to be online, or not; seconds it took."""
        started = time.monotonic()
        with contextlib.closing(self.fleet.client()) as client:
            while [row["online"] for row in client.fleet() if row["agent"] == self.name] != [wanted]:
                took = time.monotonic() - started
                assert took < within_s, f"{self.name} is not {'online' if wanted else 'offline'}\n{self.board.tail()}"
                time.sleep(0.5)
        return time.monotonic() - started

    def ask(self, client: Client, wait: str = "final") -> Answer:
        """An answer by the board and the referee."""
        return client.infer("wearable", {"window": WINDOWS}, policy="referee", wait=wait)

    def answers(self) -> None:
        """Its signed outputs agree with the referee's."""
        with contextlib.closing(self.fleet.client()) as client:
            answer = self.ask(client)
        assert answer.assurance == "verified"
        for verdict in answer.verdicts:
            assert self.fleet.stances(verdict) == {self.name: "agree"}

    def no_token_left(self) -> None:
        """Not in a file of the board, nor in a sector of the boot partition that a reader of cards finds."""
        places = "/boot/firmware /var/lib/cloud /run/cloud-init /var/lib/bmoe-agent /etc"
        said = self.board.run(f"grep -rlF {self.token} {places}")[1]
        assert [line for line in said.splitlines() if not line.startswith("grep: ")] == []
        self.board.check("sync")
        with self.card.open("rb") as card:
            card.seek(START_MB * MIB)
            assert self.token.encode() not in card.read(BOOT_MB * MIB)

    def doctor(self) -> str:
        """What the board's doctor says, and nothing of it is wrong."""
        status, said = self.board.run("/opt/bmoe/bin/bmoe-agent doctor --state /var/lib/bmoe-agent")
        print(f"\n{said}")
        assert status == 0, said
        return said


def card_of(root: Path) -> Path:
    """Where the card's file is."""
    return root / "card.img"


def flash_target(root: Path, fleet: Fleet, wheels: Path) -> str:
    """Where to, in place of a device: a file, a gateway as the board sees it, and wheels instead of an index."""
    port = read_ports(fleet.state)["fleet"]
    return f"--output {card_of(root)} --gateway https://{HOST}:{port} --wheels {wheels}"


def run_line(line: str, root: Path, replaced: dict[str, str]) -> str:
    """Run one line of README with what is this place's put for what is the reader's."""
    for theirs, ours in replaced.items():
        line = line.replace(theirs, ours)
    for name, argv in COMMANDS.items():
        line = re.sub(rf"(^|\$\(|; ){name} ", lambda m, a=argv: f"{m[1]}{a[0]} -c '{a[2]}' ", line)  # type: ignore[misc]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BMOE_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, shell=True, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout
