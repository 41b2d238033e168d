"""`bmoe up` on a state directory that is damaged, of another version, read-only, in use, or whose ports are taken.

Each is one clear line that names the file or port and the way out; nothing is started and nothing is changed.
"""

from __future__ import annotations

import datetime
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from bmoe.protocol.errors import BmoeError, ConfigError
from bmoe.protocol.state_format import check_format
from coordinator import up
from coordinator.config import load_settings
from coordinator.embedded.state_dir import lock_state
from coordinator.identity import authority
from coordinator.identity.infrastructure import prepare_identity
from coordinator.state_layout import STATE_FORMAT, StateLayout
from edge_agent.service import STATE_FORMAT as BOARD_FORMAT

PORTS = ("api", "fleet", "metrics", "broker.mqtt", "broker.client", "ledger.client")


class Started(Exception):
    """The gateway got as far as starting processes."""


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory as an earlier run left it."""
    state = tmp_path_factory.mktemp("founded") / "state"
    layout = StateLayout(state)
    check_format(state, STATE_FORMAT, layout.trust, unmarked=0)
    identity = prepare_identity(state, up.VALIDATORS, ("127.0.0.1",))
    up.prepare_trust(layout, identity.registrar.public_key)
    with free_ports() as free:
        layout.ports.write_text(json.dumps({name: free() for name in PORTS}))
    return state


@contextmanager
def free_ports() -> Iterator[Callable[[], int]]:
    """Free ports, all different, given back at the end."""
    held: list[socket.socket] = []

    def free() -> int:
        held.append(socket.create_server(("127.0.0.1", 0)))
        return int(held[-1].getsockname()[1])

    try:
        yield free
    finally:
        for one in held:
            one.close()


@pytest.fixture
def state(founded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be spoiled; starting a process is as far as a start can get here."""

    async def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(up.Supervisor, "start", start)
    return Path(shutil.copytree(founded, tmp_path / "state"))


def refusal(state: Path, **settings: object) -> str:
    """The one line with which `bmoe up` refuses; the directory is as it was before."""
    before = contents(state)
    with pytest.raises(BmoeError) as refused:
        up.run_gateway(load_settings(state=state, **settings), print)
    assert contents(state) == before, "a start that was refused changed files"
    line = str(refused.value)
    assert "\n" not in line and len(line) < 400, line
    return line


def contents(state: Path) -> dict[str, bytes]:
    """Every file that matters."""
    passing = ("lock", "figures", "reach.json", "gateway.toml", "broker/", "ledger/")
    files = [path for path in state.rglob("*") if path.is_file()] if state.is_dir() else []
    relative = {path.relative_to(state).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in relative.items() if not name.startswith(passing)}


def test_a_sound_directory_starts(state: Path) -> None:
    with pytest.raises(Started):
        up.run_gateway(load_settings(state=state), print)


@pytest.mark.parametrize("name", PORTS)
def test_a_remembered_port_that_another_process_took(state: Path, name: str) -> None:
    port = json.loads((state / "ports.json").read_text())[name]
    with socket.create_server(("127.0.0.1", port)):
        line = refusal(state)
    assert f"cannot listen on 127.0.0.1 port {port}" in line and "it is taken by another process" in line
    assert "end that process" in line and name.split(".")[-1] in line


@pytest.mark.parametrize("setting", ["api_port", "fleet_port", "metrics_port", "mqtt_port"])
def test_a_port_of_the_settings_that_another_process_took(state: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        line = refusal(state, **{setting: (port := other.getsockname()[1])})
    assert f"port {port}" in line and "taken by another process; choose another port in the settings" in line


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ('{"format": 2, "version": "9.0"}', "was made by a newer bmoe (9.0, format 2)"),
        ('{"format": 0, "version": "0.0.9"}', "was made by an older bmoe (0.0.9, format 0)"),
        (None, "was made by an older bmoe (an earlier version, format 0)"),
        ('{"format": 1', "format.json is damaged"),
        ('{"format": true, "version": "x"}', "format must be a number, found True"),
    ],
)
def test_a_directory_of_another_version(state: Path, mark: str | None, words: str) -> None:
    path = state / "format.json"
    path.unlink() if mark is None else path.write_text(mark)
    line = refusal(state)
    assert words in line and str(state) in line
    assert any(remedy in line for remedy in ("install that version", "begin anew", "restore it", "number"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("trust.json", b"{", "trust"),
        ("trust.json", b"", "trust"),
        ("trust.json", b"[" * 100_000, "trust"),
        ("ports.json", b"\xff", "ports.json cannot be read as JSON"),
        ("ports.json", b'{"api": "many"}', "ports.json must map names to ports"),
        ("identity/ca.key", b"", "ca.key"),
        ("identity/ca.key", b"\0" * 300, "ca.key"),
        ("identity/ca.pem", b"no certificate", "ca.pem"),
        ("identity/registrar.key", b"short", "registrar.key must hold 32 bytes, holds 5"),
        ("identity/registrar.key", bytes(32), "registrar.key holds only zeros"),
        ("identity/issuer.nk", b"XX", "issuer.nk"),
        ("coordinator/coordinator.key", b"", "coordinator.key must hold 32 bytes, holds 0"),
        ("validator-1/validator.key", b"x" * 33, "validator.key must hold 32 bytes, holds 33"),
        ("identity/pki/coordinator.key", b"", "coordinator.key"),
        ("gateway.toml", b"no_such_setting = 1", "no_such_setting"),
        ("gateway.toml", b"window_ms = ", "gateway.toml"),
    ],
)
def test_a_damaged_file(state: Path, file: str, content: bytes, words: str) -> None:
    (state / file).write_bytes(content)
    assert words in refusal(state)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("identity/ca.key", "ca.pem is not of the key beside it: restore both"),
        ("identity/registrar.key", "are not those that"),
        ("validator-1/validator.key", "are not those that"),
    ],
)
def test_a_key_that_is_gone_must_be_restored(state: Path, file: str, words: str) -> None:
    """With a new key we would found another ledger in the old one's place, or leave every board outside."""
    (state / file).unlink()
    with pytest.raises(ConfigError, match=words):
        up.run_gateway(load_settings(state=state), print)


def test_a_clock_from_before_the_gateway_was_founded(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a board without a battery for its clock. All that it certified would be refused, without a hint why."""
    before = authority._now() - datetime.timedelta(days=20_000)
    monkeypatch.setattr(authority, "_now", lambda: before)
    line = refusal(state)
    assert f"this machine's clock says {before:%Y-%m-%d}" in line and "ca.pem is valid from" in line
    assert line.endswith(": set the clock")


def test_a_directory_that_another_gateway_uses(state: Path) -> None:
    import os

    handle = lock_state(state)
    try:
        assert f"is in use by the supervisor with pid {os.getpid()}" in refusal(state)
    finally:
        os.close(handle)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert "cannot use directory" in refusal(tmp_path / "state")


def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting takes root: {done.stderr.strip()}")
    try:
        line = refusal(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    assert f"cannot use directory {folder}" in line and "Read-only file system" in line


# Boards.


def test_a_board_s_directory_is_marked_and_another_version_s_refused(tmp_path: Path) -> None:
    made = tmp_path / "identity.json"
    made.write_text("{}")
    for _ in range(2):  # one of before there were marks is of the first format
        check_format(tmp_path, BOARD_FORMAT, made, unmarked=BOARD_FORMAT)
    assert json.loads((tmp_path / "format.json").read_text())["format"] == BOARD_FORMAT
    (tmp_path / "format.json").write_text('{"format": 7, "version": "2.0"}')
    with pytest.raises(ConfigError, match=r"made by a newer bmoe \(2.0, format 7\).*install that version"):
        check_format(tmp_path, BOARD_FORMAT, made, unmarked=BOARD_FORMAT)
