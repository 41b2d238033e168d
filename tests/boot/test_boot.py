"""From a card to a serving board: README's "Deploying on real boards", line by line, and then the plug is pulled.

One Debian arm64 image, flashed with a token, boots as a whole emulated machine: systemd, cloud-init, the installation
from the card's wheels, enrolment at a gateway of this machine, tasks, a power cut, and back again by itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment import GATEWAY_SETTINGS, ROOT, Deployment, card_of, flash_target, run_line
from ledger_check import check_ledger
from machine import HOST, Machine

from bmoe.client import Answer
from bmoe.protocol.errors import BmoeError
from coordinator.boards import load_board
from coordinator.embedded.ports import read_ports
from coordinator.emulate.fleet import Fleet
from coordinator.flash.seed import make_token

BOARD, NAME = "generic-aarch64", "kitchen-pi"
JOINS_WITHIN_S = 900.0
REJOINS_WITHIN_S = 420.0
EXPOSURE_MAX = 1.5
WHOLE = (
    "import sqlite3, sys\n"
    "for name in sys.argv[1:]: print(sqlite3.connect(name).execute('pragma integrity_check').fetchone()[0])"
)


def until(true: Callable[[], bool], said: Callable[[], str], within_s: float = 180.0) -> None:
    """Wait until something is true in the guest, which tells of nothing by itself."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.5)


def readme_lines() -> list[str]:
    """The commands of README's section for a board with a card, as they stand there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Deploying on real boards\n")[1].split("\nWithout a card")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def deployed(images: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """README's lines up to the last: gateway, token, card; then power."""
    root = tmp_path_factory.mktemp("deployment")
    lines = readme_lines()
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "bmoe up",
        "bmoe token",
        *["bmoe flash"] * 2,
        "bmoe fleet",
    ]
    with Fleet(root / "fleet", settings=GATEWAY_SETTINGS) as fleet:
        deployment = Deployment(root, fleet, NAME, Machine(card_of(root), images, root, load_board(BOARD)))
        replaced = {
            "--state gateway": f"--state {fleet.state}",
            "--board rpi5": f"--board {BOARD}",
            "raspios-trixie-arm64-lite.img.xz": str(images / "debian.img"),
            "--device /dev/sdX": flash_target(root, fleet, wheels),
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
    deployed.answers()
    with contextlib.closing(deployed.fleet.client()) as client:
        (row,) = [row for row in client.fleet() if row["agent"] == NAME]
    assert row["board"] == load_board(BOARD).device_tree.model


def test_the_token_is_gone_from_the_card(deployed: Deployment) -> None:
    deployed.no_token_left()


@pytest.mark.parametrize("unit", ["bmoe-agent.service", "bmoe-source.service"])
def test_the_unit_is_as_hard_as_claimed(deployed: Deployment, unit: str) -> None:
    said = deployed.board.check(f"systemd-analyze security {unit} --no-pager")
    exposure = float(re.findall(rf"exposure level for {unit}: ([0-9.]+)", said)[0])
    print(f"\nexposure {exposure}")
    assert exposure <= EXPOSURE_MAX, said


def test_a_further_token_on_the_card_makes_it_join_anew_without_a_hand(deployed: Deployment) -> None:
    """What happens at a later boot: `bmoe-token` takes it, root's in the agent's own directory, and the agent uses it."""
    board, fleet = deployed.board, deployed.fleet
    line = f"bmoe token create --owner ada --name {NAME} --hours 1 --state {fleet.state}"
    gateway = f"https://{HOST}:{read_ports(fleet.state)['fleet']}"
    deployed.token = make_token(run_line(line, deployed.root, {}).strip(), gateway).text()
    journal = "journalctl -u bmoe-agent --no-pager"
    joined = f"{journal} | grep -c event=enrolled; true"
    assert board.check(joined).strip() == "1"
    board.check(f"echo {deployed.token} > /boot/firmware/bmoe/token && systemctl start bmoe-token.service")
    until(lambda: board.check(joined).strip() == "2", lambda: board.check("journalctl -u 'bmoe-*' -n 40 --no-pager"))
    owners = board.check("find /var/lib/private/bmoe-agent -printf '%U\\n' | sort -u").split()
    assert len(owners) == 1 and owners != ["0"], "nothing of root's is left in it"
    deployed.no_token_left()
    deployed.times["online anew"] = deployed.until_online(True, REJOINS_WITHIN_S)
    deployed.answers()


def test_a_source_asks_at_boot_once_it_has_options(deployed: Deployment) -> None:
    board, inbox = deployed.board, "/var/lib/bmoe-agent/inbox"
    assert "bmoe-source" not in board.check("systemctl list-units --state=active,failed --no-pager"), (
        "skipped until then"
    )
    options = f"SOURCE=--model wearable --watch {inbox}"
    board.check(f"mkdir -p /etc/bmoe-source && echo '{options}' > /etc/bmoe-source/options")
    board.check("systemctl start bmoe-source")

    def said() -> str:
        return board.check("journalctl -u bmoe-source -n 40 --no-pager")

    until(lambda: board.run(f"test -d {inbox}/done")[0] == 0, said)
    make = "import numpy; numpy.save('/tmp/one.npy', numpy.zeros((1, 6, 100), 'float32'))"
    board.check(f"/opt/bmoe/bin/python -c {shlex.quote(make)} && chmod 644 /tmp/one.npy && mv /tmp/one.npy {inbox}/")
    until(lambda: board.run(f"test -s {inbox}/one.npy.answer.json")[0] == 0, said)
    answer = json.loads(board.check(f"cat {inbox}/one.npy.answer.json"))
    assert answer["parameters"]["assurance"] == "verified", answer
    board.check("systemctl stop bmoe-source && rm -r /etc/bmoe-source")


def test_the_doctor_finds_nothing_wrong(deployed: Deployment) -> None:
    deployed.doctor()


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
