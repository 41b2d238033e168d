"""Installing the agent on a board: settings, token and clock into its state directory, units into systemd. Run by root once.

With another root than / it writes an image's files and starts nothing. Everything may be done again: what is there is
replaced by the same, what another profile wanted goes, and a board that has joined stays who it is.
"""

from __future__ import annotations

import grp
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import sync_folder, write_durably
from bmoe.storage.packaged import packaged
from edge_agent import clock
from edge_agent.boot_token import head, made_state, take_token, within
from edge_agent.config import load_settings
from edge_agent.handover import put

PROGRAM = Path("/opt/bmoe/bin/bmoe-agent")
PACKAGED = Path("/usr/bin/bmoe-agent")  # the Debian package's, which has its units elsewhere
UNITS = ("bmoe-agent.service", "bmoe-source.service", "bmoe-token.service")
ENABLED = ("bmoe-agent.service", "bmoe-source.service")
# Of a board's profile or of what was asked for: file in firmware_configs/systemd -> the unit that it changes.
DROP_INS = {"gpu": "bmoe-agent.service", "sensor": "bmoe-source.service"}
WATCHDOG = "system.conf.d/50-bmoe-watchdog.conf"
SETTINGS_BYTES = 64 * 1024
# The unit has no sight of these: a program there would never start.
HIDDEN = ("/home/", "/root/", "/tmp/", "/var/tmp/", "/run/user/")
# Settings of a board profile's table `agent`, and where in the profile the others stand.
ELSEWHERE = {"providers": ("onnxruntime", "providers"), "temperature_file": ("thermal", "path")}


def install(
    root: Path, *, source: Path | None, board: str | None, program: Path | None, sensor: bool = False
) -> Iterator[str]:
    """Install below `root`, telling of each step. `source` is the folder `bmoe` of a boot partition, `board` a profile,
    `sensor` lets `bmoe-agent source` at the board's serial ports and buses.

    Raises ConfigError, InputError and OSError; what was done until then may stay, and is done again.
    """
    known = profile(board) if board else detected(root)
    target = program or (PROGRAM if root != Path("/") else _own_program())
    _check_program(target, root)
    given = _read_toml(source / "agent.toml") if source and (source / "agent.toml").exists() else {}
    text = settings_text(known, given)
    state = made_state(root)
    if given or not (state / "agent.toml").exists():
        put(state, "agent.toml", text.encode(), mode=0o644)
        yield f"settings in {state / 'agent.toml'}"
    yield from _take_clock(state, source)
    taken = take_token(root, source)
    if taken:
        yield f"token taken from {taken}"
    yield from _write_units(root, units(root, known, target, sensor=sensor))
    yield _enabled(root)


def profile(name: str) -> dict[str, Any]:
    """The board profile of that name; raises ConfigError, listing what there is."""
    folder = packaged("firmware_configs", "boards")
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        raise ConfigError(f"there is no board {name[:40]!r}; there are: {', '.join(names)}")
    return _read_toml(folder / f"{name}.toml")


def detected(root: Path) -> dict[str, Any]:
    """The profile of the board that this is, by its device tree; an empty one where none fits."""
    try:
        found = (root / "proc/device-tree/compatible").read_bytes().split(b"\0")
    except OSError:
        return {}
    for path in sorted(packaged("firmware_configs", "boards").glob("*.toml")):
        known = _read_toml(path)
        own = known.get("device_tree", {}).get("compatible") or [""]
        if own[0] and own[0].encode() in found:
            return known
    return {}


def settings_text(known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """agent.toml: what the board's profile says, overruled by what was given. Raises ConfigError for what is no setting."""
    if elsewhere := {"state", "config"} & set(given):
        raise ConfigError(f"agent.toml says {', '.join(sorted(elsewhere))}: of a service, the unit says that")
    values = dict(known.get("agent", {}))
    for setting, (table, key) in ELSEWHERE.items():
        if found := known.get(table, {}).get(key):
            values[setting] = found
    values |= given
    # Judged by itself: what lies in the state directory is replaced by it, damaged as that may be.
    load_settings(**{**values, "state": Path(os.devnull)})
    # JSON's strings, numbers, truth values and lists are TOML's, but for one control character.
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in sorted(values.items()))
    return "".join(lines).replace("\x7f", "\\u007f")


def units(root: Path, known: Mapping[str, Any], program: Path, *, sensor: bool = False) -> dict[Path, str]:
    """Path and text of each file of systemd's that is ours, for a board's profile; "" for one that is not to be."""
    folder, etc = packaged("firmware_configs", "systemd"), root / "etc/systemd"
    own = program == PACKAGED and (root / "lib/systemd/system" / UNITS[0]).exists()
    made = {}
    for name in UNITS:
        made[etc / "system" / name] = "" if own else (folder / name).read_text().replace(str(PROGRAM), str(program))
    wanted = {known.get("systemd", "cpu"), "sensor" if sensor else ""}
    for drop_in, unit in DROP_INS.items():
        text = _groups_there(root, (folder / f"{drop_in}.conf").read_text()) if drop_in in wanted else ""
        made[etc / "system" / f"{unit}.d/50-{drop_in}.conf"] = text
    seconds = known.get("watchdog", {}).get("timeout_s", 0)
    made[etc / WATCHDOG] = (
        f"# The board's watchdog restarts it when the system hangs.\n[Manager]\nRuntimeWatchdogSec={seconds}\n"
        if seconds
        else ""
    )
    return made


def _write_units(root: Path, wanted: Mapping[Path, str]) -> Iterator[str]:
    for path, content in wanted.items():
        within(root, path)
        if content:
            write_durably(path, content.encode())
            yield f"unit {path}"
        elif path.exists():
            path.unlink()
            yield f"no more {path}"


def _take_clock(state: Path, source: Path | None) -> Iterator[str]:
    """The time at which the card was written has passed: nobody need believe an earlier clock."""
    path = source / "issued_at" if source else None
    if path is None or not path.exists():
        return
    text = head(path, 20).strip()
    if not text.isdigit() or int(text) > clock.LATEST_S:
        raise ConfigError(f"{path}: expected seconds since 1970, found {text!r}")
    if int(text) > clock.floor_s(state):
        put(state, clock.floor_file(state).name, b"%d\n" % int(text), mode=0o644)
        yield f"clock at least {int(text)}"


def _enabled(root: Path) -> str:
    """What `systemctl enable` does; and where this system's systemd runs, it is told, and starts the agent."""
    for unit in ENABLED:
        link = within(root, root / "etc/systemd/system/multi-user.target.wants" / unit)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            own = (root / "etc/systemd/system" / unit).exists()
            link.symlink_to(f"../{unit}" if own else f"/lib/systemd/system/{unit}")
        sync_folder(link.parent)
    if root != Path("/") or not os.path.isdir("/run/systemd/system"):
        return "enabled: starts at the next boot"
    import subprocess

    for words in (["daemon-reload"], ["restart", "--no-block", *ENABLED]):
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"systemctl {words[0]}: {done.stderr.strip() or f'status {done.returncode}'}")
    return "enabled and started: systemctl status bmoe-agent"


def _own_program() -> Path:
    """The command that runs now, where it is one."""
    own = Path(sys.argv[0]).absolute()
    return own if own.name == "bmoe-agent" and own.exists() else Path(sys.executable).parent / "bmoe-agent"


def _check_program(program: Path, root: Path) -> None:
    # Nothing that means something in a unit, such as a blank or a percent sign.
    if not re.fullmatch(r"/[\w./+-]+", str(program), re.ASCII):
        raise ConfigError(f"--program must be an absolute path of letters, digits and ./+-_, found {str(program)!r}")
    inside = [program]
    if root == Path("/"):  # an image's links lead nowhere yet
        inside += [program.resolve(), (program.parent / "python").resolve()]
    for path in inside:
        if str(path).startswith(HIDDEN):
            raise ConfigError(
                f"the service has no sight of {path}: install bmoe under /opt, in a virtual environment of a Python "
                "that all can run"
            )
    if root == Path("/") and not os.access(program, os.X_OK):
        raise ConfigError(f"{program} is no program: install bmoe there, or name it with --program")


def _groups_there(root: Path, text: str) -> str:
    """A unit that names a group which does not exist would not start at all."""
    try:
        lines = (root / "etc/group").read_text().splitlines()
    except OSError:
        lines = [group.gr_name for group in grp.getgrall()] if root == Path("/") else []
    there = {line.split(":")[0] for line in lines}

    def kept(match: re.Match[str]) -> str:
        names = [name for name in match[1].split() if name in there]
        return f"SupplementaryGroups={' '.join(names)}" if names else "# no group of a device exists here"

    return re.sub(r"(?m)^SupplementaryGroups=(.*)$", kept, text)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(head(path, SETTINGS_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
