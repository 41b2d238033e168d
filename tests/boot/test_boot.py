"""From a card to a serving board: README's "Deploying on real boards", line by line, and then the plug is pulled.

One Debian arm64 image, flashed with a token, boots as a whole emulated machine: systemd, cloud-init, the installation
from the card's wheels, enrolment at a gateway of this machine, tasks, a power cut, and back again by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image import BOOT_MB, MIB, START_MB, make_image
from machine import HOST, Machine

from bmoe.client import Answer, Client
from bmoe.protocol.errors import BmoeError
from coordinator.boards import load_board
from coordinator.embedded.ports import read_ports
from coordinator.emulate.fleet import COMMANDS, Fleet
from coordinator.emulate.sysroot import PLATFORMS, recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from ledger_check import check_ledger

ROOT = Path(__file__).resolve().parents[2]
BOARD, NAME = "generic-aarch64", "kitchen-pi"
JOINS_WITHIN_S = 900.0
REJOINS_WITHIN_S = 420.0
WINDOWS = np.random.default_rng(5).standard_normal((4, 6, 100)).astype(np.float32)
EXPOSURE_MAX = 1.5
WHOLE = (
    "import sqlite3, sys\n"
    "for name in sys.argv[1:]: print(sqlite3.connect(name).execute('pragma integrity_check').fetchone()[0])"
)


class Deployment:
    """The gateway, the card, and the board that it is put into."""

    def __init__(self, root: Path, fleet: Fleet, image: Path) -> None:
        self.root, self.fleet, self.card = root, fleet, root / "card.img"
        profile = load_board(BOARD)
        self.token = ""
        self.board = Machine(
            self.card, image.with_name("vmlinuz"), image.with_name("initrd"), root, cpu=profile.cpu,
            memory_mb=profile.memory_mb,
        )  # fmt: skip
        self.times: dict[str, float] = {}

    def until_online(self, wanted: bool, within_s: float) -> float:
        """Wait until the gateway holds the board to be online, or not; seconds it took."""
        started = time.monotonic()
        with contextlib.closing(self.fleet.client()) as client:
            while [row["online"] for row in client.fleet() if row["agent"] == NAME] != [wanted]:
                took = time.monotonic() - started
                assert took < within_s, f"{NAME} is not {'online' if wanted else 'offline'}\n{self.board.tail()}"
                time.sleep(0.5)
        return time.monotonic() - started

    def ask(self, client: Client, wait: str = "final") -> Answer:
        return client.infer("wearable", {"window": WINDOWS}, policy="referee", wait=wait)


def wheels(folder: Path) -> Path:
    """For a board without a package index: the aarch64 wheels that an agent needs, and pip's. Our own `bmoe flash` brings."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    known = recipe()
    subprocess.run(
        [*pip, "download", "--only-binary=:all:", "--implementation", "cp", "--python-version", known.suite.python,
         *platforms, "--dest", str(folder), "pip", *known.requirements],
        check=True, timeout=600,
    )  # fmt: skip
    return folder


def readme_lines() -> list[str]:
    """The commands of README's section for a board with a card, as they stand there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Deploying on real boards\n")[1].split("\nWithout a card")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines() if line]


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


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """README's lines up to the last: gateway, token, card; then power."""
    root = tmp_path_factory.mktemp("deployment")
    image = make_image()
    lines = readme_lines()
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "bmoe up",
        "bmoe token",
        *["bmoe flash"] * 2,
        "bmoe fleet",
    ]
    # This machine's network has no address that a board inside QEMU reaches but its loopback, by another name.
    with Fleet(root / "fleet", settings={"BMOE_PUBLIC_HOSTS": f'["{HOST}"]'}) as fleet:
        deployment = Deployment(root, fleet, image)
        port = read_ports(fleet.state)["fleet"]
        (root / "wheels").mkdir()
        target = f"--output {deployment.card} --gateway https://{HOST}:{port} --wheels {wheels(root / 'wheels')}"
        replaced = {
            "--state gateway": f"--state {fleet.state}",
            "--board rpi5": f"--board {BOARD}",
            "raspios-trixie-arm64-lite.img.xz": str(image),
            "--device /dev/sdX": target,
        }
        for line in lines[1:-1]:
            print(f"\n$ {line}\n{run_line(line, root, replaced)}")
        deployment.token = (root / f"{NAME}.token").read_text().strip()
        deployment.board.start()
        try:
            deployment.times["online"] = deployment.until_online(True, JOINS_WITHIN_S)
            assert f" {NAME} " in run_line(lines[-1], root, replaced)
            deployment.board.up()
            yield deployment
        finally:
            deployment.board.cut()
            print("\nseconds:", {name: round(value) for name, value in deployment.times.items()})


def test_a_flashed_board_joins_by_itself_and_answers(deployed: Deployment) -> None:
    """Nobody touched it: it installed from the card, joined, and its signed outputs agree with the referee's."""
    with contextlib.closing(deployed.fleet.client()) as client:
        answer = deployed.ask(client)
        (row,) = [row for row in client.fleet() if row["agent"] == NAME]
    assert answer.assurance == "verified"
    for verdict in answer.verdicts:
        assert deployed.fleet.stances(verdict) == {NAME: "agree"}
    assert row["board"] == load_board(BOARD).device_tree.model


def test_the_token_is_gone_from_the_card(deployed: Deployment) -> None:
    """Not in a file of the boot partition, nor in what cloud-init kept, nor in a sector of it that a reader finds."""
    secret = deployed.token
    found = deployed.board.run(f"grep -rlF {secret} /boot/firmware /var/lib/cloud /run/cloud-init /var/lib/bmoe-agent")[
        1
    ]
    assert found.strip() == ""
    deployed.board.check("sync")
    with deployed.card.open("rb") as card:
        card.seek(START_MB * MIB)
        assert secret.encode() not in card.read(BOOT_MB * MIB)


def test_the_unit_is_as_hard_as_claimed(deployed: Deployment) -> None:
    said = deployed.board.check("systemd-analyze security bmoe-agent.service --no-pager")
    exposure = float(re.findall(r"exposure level for bmoe-agent.service: ([0-9.]+)", said)[0])
    print(f"\nexposure {exposure}")
    assert exposure <= EXPOSURE_MAX, said


def test_the_doctor_finds_nothing_wrong(deployed: Deployment) -> None:
    status, said = deployed.board.run("/opt/bmoe/bin/bmoe-agent doctor --state /var/lib/bmoe-agent")
    print(f"\n{said}")
    assert status == 0, said


async def test_after_a_power_cut_it_is_back_and_nothing_acknowledged_is_lost(deployed: Deployment) -> None:
    """The plug is pulled under load. The board comes back as itself, signs no number twice, and every answer stands."""
    answers: list[Answer] = []
    enough, stop = threading.Event(), threading.Event()

    def load() -> None:
        with contextlib.closing(deployed.fleet.client()) as client:
            while not stop.is_set():
                with contextlib.suppress(BmoeError):
                    answers.append(deployed.ask(client, wait="committed"))
                if len(answers) >= 5:
                    enough.set()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        assert enough.wait(120)
        deployed.board.cut()
    finally:
        stop.set()
        thread.join()
    deployed.times["noticed"] = deployed.until_online(False, 120)
    deployed.board.start()
    deployed.times["back"] = deployed.until_online(True, REJOINS_WITHIN_S)
    deployed.board.up()
    with contextlib.closing(deployed.fleet.client()) as client:
        after = deployed.ask(client)
    assert all(deployed.fleet.stances(verdict) == {NAME: "agree"} for verdict in after.verdicts)
    facts = await check_ledger(deployed.fleet.state)
    for answer in [*answers, after]:
        facts.expect(answer)
    assert facts.equivocations == [] and facts.state.agents[NAME].refutations == 0
    console = deployed.board.console.read_text(errors="replace")
    assert "EXT4-fs error" not in console
    assert set(deployed.board.check(f"python3 -c {shlex.quote(WHOLE)} /var/lib/bmoe-agent/*.db").split()) == {"ok"}
