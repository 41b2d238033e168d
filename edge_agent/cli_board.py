"""The commands of `bmoe-agent` for the board itself: `install`, which makes it a service, and `doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def add_board_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add them to the sub-parsers of `bmoe-agent`; returns those that take --state and --config."""
    install = commands.add_parser(
        "install", help="make the agent a service that starts at boot", description=_install.__doc__
    )
    install.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", help="the folder `bmoe` of a boot partition"
    )
    install.add_argument("--board", help="the board's profile; default: found by its device tree, else none")
    install.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="write into this system's tree and start nothing"
    )
    install.add_argument("--program", type=Path, metavar="PATH", help="where bmoe-agent is, for the unit")
    install.add_argument(
        "--sensor", action="store_true", help="let `bmoe-agent source` at serial ports, I2C, SPI and GPIO"
    )
    install.add_argument(
        "--token", action="store_true", help="only take a token from the boot partition, if there is one"
    )
    install.set_defaults(command=_install)

    doctor = commands.add_parser("doctor", help="check the board and say what is wrong", description=_doctor.__doc__)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command=_doctor)
    return [doctor]


def _install(arguments: argparse.Namespace) -> int:
    """Write settings, token and units, and start the service; by root. What is there already is replaced by the same."""
    from edge_agent.boot_token import take_token
    from edge_agent.install import install

    if arguments.token:
        found = take_token(arguments.root, arguments.source)
        print(f"token taken from {found}" if found else "no token on the boot partition")
        return 0
    a = arguments
    for step in install(a.root, source=a.source, board=a.board, program=a.program, sensor=a.sensor):
        print(step, flush=True)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Check clock, disk, gateway, certificate, onnxruntime, temperature, memory, watchdog and service, a line each.

    Changes nothing. Exit status 1 if anything failed.
    """
    from bmoe.protocol.errors import ConfigError
    from edge_agent.config import SYSTEM_STATE, load_settings
    from edge_agent.doctor import examine

    if arguments.state is None and os.path.lexists(SYSTEM_STATE) and not os.access(SYSTEM_STATE, os.R_OK | os.X_OK):
        raise ConfigError(f"{SYSTEM_STATE} can be read by root and the agent alone: sudo bmoe-agent doctor")
    findings = examine(load_settings(state=arguments.state, config=arguments.config))
    if arguments.json:
        import json

        print(json.dumps({"ok": all(f.ok is not False for f in findings), "checks": [f.facts() for f in findings]}))
    else:
        for finding in findings:
            print(finding.line())
    sys.stdout.flush()
    return 1 if any(finding.ok is False for finding in findings) else 0
