"""The command `bmoe-agent`: join a gateway once, then run for ever. One clear line on standard error when it cannot."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from bmoe import __version__
from bmoe.protocol.errors import BmoeError, ConfigError, InputError
from edge_agent.cli_board import add_board_commands
from edge_agent.cli_source import add_source_commands

EPILOG = """
first time on a board:
  1. on the gateway, `bmoe token create` prints a one-time token
  2. on the board:  bmoe-agent join bmoe1.XXXX --name kitchen-pi
  3. on the board:  bmoe-agent run          (or, as root: bmoe-agent install, which starts it now and at each boot)

settings come from flags, then BMOE_AGENT_* variables (BMOE_AGENT_QUEUE_LIMIT=16), then agent.toml in the state
directory (queue_limit = 16); `bmoe-agent settings` shows all of them with what is in force.
exit status: 0 done, 1 it failed (the network, the gateway's refusal), 2 a wrong argument or setting.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits."""
    sys.exit(run_command(argv))


def run_command(argv: Sequence[str] | None = None) -> int:
    """Parse and carry out; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except (ConfigError, InputError) as error:
        return _fail(error, 2)
    except BmoeError as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: object, status: int) -> int:
    print(f"bmoe-agent: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bmoe-agent",
        description="The agent of a board: it runs ONNX experts for a gateway and signs what they give.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bmoe-agent {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    join = commands.add_parser("join", help="enrol this device with a one-time token", description=_join.__doc__)
    join.add_argument("token", help="the token, or - to read it from standard input")
    join.add_argument(
        "--name", help="this device's name, a-z 0-9 and '-'; default: its host name and 4 digits of its key"
    )
    join.add_argument("--gateway", metavar="URL", help="reach the gateway there instead of where the token says")
    join.add_argument(
        "--force", action="store_true", help="join anew; the signing key, and with it the standing, is kept"
    )
    join.set_defaults(command=_join)

    run = commands.add_parser("run", help="serve until told to stop", description=_run.__doc__)
    run.add_argument("--queue-limit", type=int, metavar="N", help="tasks in work at once")
    run.add_argument("--memory-mb", type=int, metavar="MB", help="memory that experts may use")
    run.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    run.set_defaults(command=_run)

    settings = commands.add_parser("settings", help="show every setting and what is in force")
    settings.set_defaults(command=_settings)
    asking = [*add_source_commands(commands), *add_board_commands(commands)]
    for command in (join, run, settings, *asking):
        command.add_argument("--state", type=Path, metavar="DIR", help="the one directory that is written to")
    for command in (run, settings, *asking):
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file; default: agent.toml in --state")
    return parser


def _join(arguments: argparse.Namespace) -> int:
    """Make this device's keys, check the gateway against the token, and enrol. Sending the same token again is safe."""
    from edge_agent.config import load_settings
    from edge_agent.handover import hand_over
    from edge_agent.join import join

    token = sys.stdin.readline() if arguments.token == "-" else arguments.token
    state = load_settings(state=arguments.state).state
    a = arguments
    try:
        # What root makes in an agent's directory is given to the agent before that may look at it.
        identity = join(state, token, name=a.name, gateway=a.gateway, force=a.force, check=lambda *_: hand_over(state))
    finally:
        if state.is_dir():
            hand_over(state)
    print(f"joined {identity.url} as {identity.name} (owner {identity.owner}); now: bmoe-agent run, if it does not")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    """Connect to the gateway, fetch experts as they are asked for, answer tasks. Ends cleanly on SIGTERM and Ctrl-C."""
    from edge_agent.config import load_settings
    from edge_agent.service import serve

    settings = load_settings(
        state=arguments.state,
        config=arguments.config,
        queue_limit=arguments.queue_limit,
        memory_mb=arguments.memory_mb,
        log_level=arguments.log_level,
    )
    asyncio.run(serve(settings))
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    """Show every setting, its value now, and what it means."""
    from edge_agent.config import AgentSettings, load_settings

    found = load_settings(state=arguments.state, config=arguments.config)
    for name, field in AgentSettings.model_fields.items():
        print(f"{name} = {getattr(found, name)}\n    {field.description}")
    return 0
