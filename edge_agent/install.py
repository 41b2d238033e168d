"""Installing the agent on a board: settings, token and clock into its state directory, units into systemd. Run by root once.

With another root than / it writes an image's files and starts nothing. Everything may be done again: what is there already
is replaced by the same, and a board that has joined stays who it is.
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

from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.join_token import parse_token
from bmoe.storage.packaged import packaged
from edge_agent import clock, enrol
from edge_agent.config import SYSTEM_STATE, load_settings

PROGRAM = Path("/opt/bmoe/bin/bmoe-agent")
UNITS = ("bmoe-agent.service", "bmoe-token.service")
BOOT_FOLDERS = ("boot/firmware/bmoe", "boot/bmoe")
# What other programs of a first boot may have copied a token into.
COPIES = ("boot/firmware/*", "boot/*", "var/lib/cloud/**/*", "run/cloud-init/**/*")
COPY_BYTES = 8 << 20
# The unit has no sight of these: a program there would never start.
HIDDEN = ("/home/", "/root/", "/tmp/", "/var/tmp/", "/run/user/")
# Settings of a board profile's table `agent`, and where in the profile the others stand.
ELSEWHERE = {"providers": ("onnxruntime", "providers"), "temperature_file": ("thermal", "path")}


def install(root: Path, *, source: Path | None, board: str | None, program: Path | None) -> Iterator[str]:
    """Install below `root`, telling of each step. `source` is the folder `bmoe` of a boot partition, `board` a profile.

    Raises ConfigError, InputError and OSError; what was done until then may stay, and is done again.
    """
    state = root / SYSTEM_STATE.relative_to("/")
    known = profile(board) if board else detected(root)
    target = program or (PROGRAM if root != Path("/") else _own_program())
    _check_program(target, root)
    given = _read_toml(source / "agent.toml") if source and (source / "agent.toml").exists() else {}
    text = settings_text(state, known, given)
    os.makedirs(state, mode=0o700, exist_ok=True)
    if given or not (state / "agent.toml").exists():
        write_durably(state / "agent.toml", text.encode())
        yield f"settings in {state / 'agent.toml'}"
    yield from _take_clock(state, source)
    taken = take_token(root, source)
    if taken:
        yield f"token taken from {taken}"
    for path, content in units(root, known, target).items():
        write_durably(path, content.encode())
        yield f"unit {path}"
    yield _enabled(root)
    _give_to_owner(state)


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


def settings_text(state: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """agent.toml: what the board's profile says, overruled by what was given. Raises ConfigError for what is no setting."""
    values = dict(known.get("agent", {}))
    for setting, (table, key) in ELSEWHERE.items():
        if found := known.get(table, {}).get(key):
            values[setting] = found
    values |= given
    load_settings(**{**values, "state": state})
    # JSON's strings, numbers, truth values and lists are TOML's.
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in sorted(values.items()))


def units(root: Path, known: Mapping[str, Any], program: Path) -> dict[Path, str]:
    """Path and text of each file of systemd's, for a board's profile."""
    folder, etc = packaged("firmware_configs", "systemd"), root / "etc/systemd"
    made = {etc / "system" / name: (folder / name).read_text().replace(str(PROGRAM), str(program)) for name in UNITS}
    kind = known.get("systemd", "cpu")
    for drop_in in ("gpu", "sensor"):
        if drop_in == kind:
            text = _groups_there(root, (folder / f"{drop_in}.conf").read_text())
            made[etc / "system/bmoe-agent.service.d" / f"50-{drop_in}.conf"] = text
    seconds = known.get("watchdog", {}).get("timeout_s", 0)
    if seconds:
        made[etc / "system.conf.d/50-bmoe-watchdog.conf"] = (
            f"# The board's watchdog restarts it when the system hangs.\n[Manager]\nRuntimeWatchdogSec={seconds}\n"
        )
    return made


def take_token(root: Path, source: Path | None = None) -> Path | None:
    """Move a token from the boot partition into the state directory; returns where it was found, None if nowhere.

    It is destroyed in its old place, and in what a first boot's programs copied, once it is durable in the new one: that
    is readable by the agent alone, and destroyed as soon as the agent has joined. Raises InputError for what is no token.
    """
    state = root / SYSTEM_STATE.relative_to("/")
    folders = [*([source] if source else []), *(root / folder for folder in BOOT_FOLDERS)]
    found = next((folder for folder in folders if (folder / "token").exists()), None)
    if found is None:
        return None
    text = (found / "token").read_bytes()[: enrol.TOKEN_BYTES].decode(errors="replace").strip()
    try:
        parse_token(text)
    except InputError as error:
        raise ConfigError(f"{found / 'token'}: {error}") from None
    os.makedirs(state, mode=0o700, exist_ok=True)
    if (found / "name").exists():
        write_durably(enrol.name_file(state), (found / "name").read_bytes()[:256], mode=0o600)
    write_durably(enrol.token_file(state), text.encode() + b"\n", mode=0o600)
    _give_to_owner(state)
    enrol.shred(found / "token")
    for pattern in COPIES:
        for path in root.glob(pattern):
            _blank(path, text.encode())
    return found / "token"


def _blank(path: Path, secret: bytes) -> None:
    """Overwrite a secret inside a file with as many x: what reads the file finds its form unchanged."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > COPY_BYTES:
            return
        data = path.read_bytes()
        if secret in data:
            with path.open("r+b") as file:
                file.write(data.replace(secret, b"x" * len(secret)))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        print(f"bmoe-agent: {path} may hold a copy of the token: {error.strerror}", file=sys.stderr)


def _take_clock(state: Path, source: Path | None) -> Iterator[str]:
    """The time at which the card was written has passed: nobody need believe an earlier clock."""
    path = source / "issued_at" if source else None
    if path is None or not path.exists():
        return
    text = path.read_bytes()[:20].strip()
    if not text.isdigit():
        raise ConfigError(f"{path}: expected seconds since 1970, found {text[:20]!r}")
    if int(text) > clock.floor_s(state):
        clock.save(state, int(text))
        yield f"clock at least {int(text)}"


def _enabled(root: Path) -> str:
    """What `systemctl enable` does; and where this system's systemd runs, it is told, and starts the agent."""
    link = root / "etc/systemd/system/multi-user.target.wants/bmoe-agent.service"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to("../bmoe-agent.service")
    if root != Path("/") or not os.path.isdir("/run/systemd/system"):
        return "enabled: starts at the next boot"
    import subprocess

    for words in (["daemon-reload"], ["restart", "--no-block", "bmoe-agent.service"]):
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"systemctl {words[0]}: {done.stderr.strip() or f'status {done.returncode}'}")
    return "enabled and started: systemctl status bmoe-agent"


def _own_program() -> Path:
    """The command that runs now, where it is one."""
    own = Path(sys.argv[0]).absolute()
    return own if own.name == "bmoe-agent" and own.exists() else Path(sys.executable).parent / "bmoe-agent"


def _check_program(program: Path, root: Path) -> None:
    if not program.is_absolute() or re.search(r"\s", str(program)):
        raise ConfigError(f"--program must be an absolute path without spaces, found {str(program)!r}")
    if str(program).startswith(HIDDEN):
        raise ConfigError(
            f"the service has no sight of {program}: install bmoe under /opt, in a virtual environment there"
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


def _give_to_owner(state: Path) -> None:
    """What root wrote into a directory of another's must be that one's: the agent runs without any rights of root."""
    owner = state.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return  # before the agent's first start: systemd then gives it the whole
    for path in (state / "agent.toml", clock.floor_file(state), state / "join", *(state / "join").glob("*")):
        if path.exists():
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
