"""The commands of `bmoe-agent` that ask the gateway: `source`, and `mosquitto`, which shows how others ask with our name."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from pathlib import Path
from typing import Any

SOURCE_EPILOG = """
a folder:      bmoe-agent source --model wearable --watch inbox
               a .npy, .npz, .json or .csv file dropped into inbox/ is a request; its answer is written to
               inbox/NAME.answer.json and the file moved to inbox/done/
a function:    bmoe-agent source --model wearable --hook sensor:readings --verified sensor:on_verified
               sensor.py in the working directory has a generator `readings()` that yields requests
"""


def add_source_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add them to the sub-parsers of `bmoe-agent`; returns those that take --state and --config."""
    source = commands.add_parser(
        "source", help="ask a model about what a folder or a function gives", description=_source.__doc__,
        epilog=SOURCE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    source.add_argument("--model", required=True, help="the model to ask")
    kind = source.add_mutually_exclusive_group(required=True)
    kind.add_argument("--watch", type=Path, metavar="FOLDER", help="files dropped into this folder are requests")
    kind.add_argument("--hook", metavar="MODULE:FUNCTION", help="a generator function that yields requests")
    source.add_argument(
        "--verified", metavar="MODULE:FUNCTION", help="with --hook: is called with what is verified later"
    )
    source.add_argument("--policy", help="parameters.policy of each request; default: the gateway's")
    source.add_argument("--wait", choices=("decided", "committed", "final"), help="how far an answer must have got")
    source.add_argument(
        "--local", action="store_true", default=None, help="answer on this board, unverified, while the gateway is away"
    )
    source.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    source.set_defaults(command=_source)
    mosquitto = commands.add_parser(
        "mosquitto",
        help="show how mosquitto_pub or mosquitto_sub connects as this device",
        description=_mosquitto.__doc__,
    )
    mosquitto.add_argument("session", choices=("pub", "sub"), help="which of the two sessions")
    mosquitto.set_defaults(command=_mosquitto)
    return [source, mosquitto]


def _source(arguments: argparse.Namespace) -> int:
    """Ask the gateway about what a source gives, and hand the answers back. Ends cleanly on SIGTERM and Ctrl-C."""
    from bmoe.protocol.errors import ConfigError
    from edge_agent.config import load_settings
    from edge_agent.source import Source
    from edge_agent.source_folder import FolderSource
    from edge_agent.source_hook import HookSource, load_function
    from edge_agent.source_service import serve_source

    settings = load_settings(
        state=arguments.state, config=arguments.config, log_level=arguments.log_level, source_local=arguments.local
    )
    if arguments.verified and not arguments.hook:
        raise ConfigError("--verified names a function of a hook: a watched folder gets .verified.json files")
    source: Source
    if arguments.hook:
        source = HookSource(
            load_function(arguments.hook), load_function(arguments.verified) if arguments.verified else None
        )
    else:
        source = FolderSource(arguments.watch, poll_s=settings.source_poll_s, file_bytes=settings.source_file_bytes)
    parameters = {"policy": arguments.policy, "wait": arguments.wait}
    given = {key: value for key, value in parameters.items() if value}
    asyncio.run(serve_source(settings, arguments.model, source, given))
    return 0


def _mosquitto(arguments: argparse.Namespace) -> int:
    """Print the options with which mosquitto_pub or mosquitto_sub connects as this device: broker, certificate, client id.

    The session's certificate is fetched from the gateway where there is none, or its end is near.

    mosquitto_pub $(bmoe-agent mosquitto pub) -t bmoe/v1/NAME/request/MODEL -f request.json
    """
    from bmoe.protocol.errors import UnavailableError
    from bmoe.protocol.tls import mutual_tls
    from edge_agent.certificates import ensure
    from edge_agent.config import load_settings
    from edge_agent.fleet import FleetClient
    from edge_agent.identity import load_identity

    i = load_identity(load_settings(state=arguments.state, config=arguments.config).state)
    certificate = i.certificate_of(arguments.session)
    try:
        ensure(i, FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key)), arguments.session)
    except UnavailableError:
        if not certificate.exists():
            raise
    options = {
        "-h": i.broker_host, "-p": i.broker_port, "--cafile": i.ca, "--cert": certificate, "--key": i.key,
        "-i": f"{i.name}:{arguments.session}",
    }  # fmt: skip
    print(" ".join(f"{option} {shlex.quote(str(value))}" for option, value in options.items()))
    return 0
