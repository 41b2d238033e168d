"""Raspberry Pi OS up to its first Trixie image: systemd.run= starts firstrun.sh, the board restarts, installs and joins.

An image laid out like theirs, flashed for a Raspberry Pi with all that can be wished for, boots by the command line that
is on the card, with its plug pulled in the middle of its first boot.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian import RASPBERRY_PI_OS
from deployment import GATEWAY_SETTINGS, Deployment, card_of, flash_target, run_line
from host_tools import HostTools
from image import START_MB
from machine import Machine

from coordinator.boards import load_board
from coordinator.emulate.fleet import Fleet

BOARD, NAME = "rpi4", "shed-pi"
FIRSTRUN_WITHIN_S = 420.0
JOINS_WITHIN_S = 1200.0
LINE = RASPBERRY_PI_OS.boot["cmdline.txt"].split()
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHV0dGVybHkgd2l0aG91dCBtZWFuaW5n operator@desk"
WISHES = (
    f"--name {NAME} --timezone Europe/Berlin --ssh-key key.pub "
    "--wifi-ssid shed --wifi-password ThisIsAPassword --wifi-country DE"
)


class Card:
    """What a firmware sees of the card: its FAT."""

    def __init__(self, path: Path) -> None:
        self._tools, self._place = HostTools(), f"{path}@@{START_MB}M"

    def line(self) -> str:
        """The kernel's command line."""
        return self._tools.run("mcopy", "-i", self._place, "::cmdline.txt", "-").strip()

    def names(self, folder: str = "") -> set[str]:
        """The files of a folder."""
        listed = self._tools.run("mdir", "-b", "-i", self._place, f"::{folder}").splitlines()
        return {line.rstrip("/").rpartition("/")[2] for line in listed}


@pytest.fixture(scope="module")
def deployed(images: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A gateway, and a card that is flashed for a Raspberry Pi; no power yet."""
    root = tmp_path_factory.mktemp("firstrun")
    (root / "key.pub").write_text(SSH_KEY + "\n")
    image = images / f"{RASPBERRY_PI_OS.name}.img"
    with Fleet(root / "fleet", settings=GATEWAY_SETTINGS) as fleet:
        board = Machine(card_of(root), images, root, load_board(BOARD), line=lambda: Card(card_of(root)).line())
        deployment = Deployment(root, fleet, NAME, board)
        token = run_line(f"bmoe token create --owner ada --name {NAME} --state {fleet.state}", root, {})
        (root / "token").write_text(token)
        deployment.token = token.strip()
        where = flash_target(root, fleet, wheels)
        said = run_line(f"bmoe flash --board {BOARD} --image {image} --token-file token {where} {WISHES}", root, {})
        assert "first boot by firstrun" in said, said
        yield deployment
        board.cut()
        print("\nseconds:", {name: round(value) for name, value in deployment.times.items()})


def test_a_plug_pulled_while_firstrun_runs_costs_nothing(deployed: Deployment) -> None:
    """Told by its own words on the console, which come before it takes itself out: the next boot does it again, or had
    it done."""
    card, board = Card(deployed.card), deployed.board
    assert card.line().split()[len(LINE) :] == [
        "systemd.run=/boot/firmware/firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
        "cfg80211.ieee80211_regdom=DE",
    ]
    board.start()
    deployed.times["firstrun speaks"] = board.says("bmoe first boot: the agent will be installed", FIRSTRUN_WITHIN_S)
    board.cut()
    assert card.line().split()[: len(LINE)] == LINE


def test_firstrun_takes_itself_out_and_restarts_the_board(deployed: Deployment) -> None:
    card = Card(deployed.card)
    deployed.board.start()
    deployed.times["firstrun restarts"] = deployed.board.restarts(FIRSTRUN_WITHIN_S)
    assert card.line().split() == [*LINE, "cfg80211.ieee80211_regdom=DE"]
    assert "firstrun.sh" not in card.names() and "wifi.nmconnection" not in card.names("bmoe")
    assert {"token", "install.sh", "wheels"} <= card.names("bmoe")


def test_then_it_installs_joins_and_answers(deployed: Deployment) -> None:
    deployed.board.start()
    deployed.times["online"] = deployed.until_online(True, JOINS_WITHIN_S)
    deployed.board.up()
    deployed.answers()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("cat /etc/hostname", NAME),
        (f"grep -c '^127.0.1.1.{NAME}$' /etc/hosts", "1"),
        ("readlink /etc/localtime", "/usr/share/zoneinfo/Europe/Berlin"),
        ("stat -c '%a %U' /etc/NetworkManager/system-connections/bmoe-wifi.nmconnection", "600 root"),
        ("stat -c '%a %U' /home/pi/.ssh /home/pi/.ssh/authorized_keys", "700 pi\n600 pi"),
        (f"grep -cxF {shlex.quote(SSH_KEY)} /home/pi/.ssh/authorized_keys", "1"),
        ("cat /etc/ssh/sshd_config.d/50-bmoe.conf", "PasswordAuthentication no"),
        ("systemctl is-enabled ssh", "enabled"),
        ("systemctl is-enabled bmoe-agent", "enabled"),
        ("grep -c systemd.run /proc/cmdline; systemctl is-active default.target", "0\nactive"),
        ("ls /etc/systemd/system/multi-user.target.wants | grep -c bmoe-first-boot", "0"),
        ("cat /sys/class/watchdog/watchdog0/state", "active"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_all_that_was_wished_for_is_so(deployed: Deployment, command: str, expected: str) -> None:
    assert deployed.board.run(command)[1].strip() == expected


def test_the_token_is_gone_from_the_card(deployed: Deployment) -> None:
    deployed.no_token_left()


def test_the_doctor_finds_nothing_wrong(deployed: Deployment) -> None:
    deployed.doctor()
