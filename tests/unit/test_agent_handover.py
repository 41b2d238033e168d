"""What root writes where the agent may write too: an agent that was taken over gets none of root's files by it.

Root's part runs as root; without it these tests say so and are skipped, but for what needs no second user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from test_agent_install import COPIES, SECRET, root

from edge_agent import boot_token, cli
from edge_agent import install as installing
from edge_agent.boot_token import take_token
from edge_agent.handover import drop, hand_over, put
from edge_agent.install import install
from edge_agent.shred import blank, shred

__all__ = ["root"]  # a fixture
AGENT = 61234
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it is about what root does for another user")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The directory of an agent that has run: systemd has given it away."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(state, AGENT, AGENT)
    return state


def test_what_is_put_there_is_whole_and_replaced_in_one_step(state: Path) -> None:
    put(state, "join/token", b"one")
    put(state, "join/token", b"another", mode=0o640)
    assert (state / "join/token").read_bytes() == b"another" and os.listdir(state / "join") == ["token"]
    assert (state / "join/token").stat().st_mode & 0o777 == 0o640
    (state / "join/.token.new").write_text("left by a power cut")
    put(state, "join/token", b"third")
    drop(state, "join/token")
    drop(state, "join/token")
    drop(state, "nowhere/token")
    assert os.listdir(state / "join") == [] and os.listdir(state) == ["join"]


@only_root
def test_it_belongs_to_the_agent(state: Path) -> None:
    put(state, "join/token", b"one")
    assert {(state / name).stat().st_uid for name in ("join", "join/token")} == {AGENT}


@pytest.mark.parametrize("place", ["folder", "file", "new"])
def test_a_link_in_its_place_leads_nowhere(state: Path, tmp_path: Path, place: str) -> None:
    """An agent that was taken over points `join` at /etc, or `token` at /etc/shadow."""
    victim = tmp_path / "etc"
    victim.mkdir()
    (victim / "token").write_text("root's own")
    if place == "folder":
        (state / "join").symlink_to(victim)
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            put(state, "join/token", b"mine")
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            drop(state, "join/token")
    else:
        (state / "join").mkdir()
        (state / "join" / {"file": "token", "new": ".token.new"}[place]).symlink_to(victim / "token")
        put(state, "join/token", b"mine")
        assert (state / "join/token").read_bytes() == b"mine"
    assert (victim / "token").read_text() == "root's own" and os.listdir(victim) == ["token"]
    assert victim.stat().st_uid == (victim / "token").stat().st_uid == os.geteuid()


@only_root
def test_handing_over_gives_what_root_left_and_nothing_that_only_seems_to_lie_there(
    state: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "etc"
    victim.mkdir()
    for name in ("shadow", "passwd"):
        (victim / name).write_text("root's own")
    (state / "identity/a").mkdir(parents=True)
    (state / "identity/a/signing.key").write_bytes(b"k")
    (state / "identity/folder").symlink_to(victim)
    (state / "identity/file").symlink_to(victim / "shadow")
    os.link(victim / "passwd", state / "identity/second-name")
    os.mkfifo(state / "identity/pipe")
    hand_over(state)
    assert {(state / name).stat().st_uid for name in ("identity", "identity/a", "identity/a/signing.key")} == {AGENT}
    assert {(victim / name).stat().st_uid for name in ("", "shadow", "passwd")} == {0}


@only_root
def test_a_token_for_a_board_that_runs_is_the_agents_to_read(root: Path) -> None:
    """`bmoe-token.service` at a later boot: the directory is the agent's by then."""
    state = root / "var/lib/bmoe-agent"
    state.mkdir(parents=True, mode=0o700)
    os.chown(state, AGENT, AGENT)
    list(install(root, source=root / "boot/firmware/bmoe", board=None, program=None))
    given = ("join", "join/token", "join/name", "agent.toml", "clock")
    assert {(state / name).stat().st_uid for name in given} == {AGENT}


@only_root
def test_a_taken_over_agent_gains_nothing_by_an_install(root: Path) -> None:
    state = root / "var/lib/bmoe-agent"
    state.mkdir(parents=True, mode=0o700)
    os.chown(state, AGENT, AGENT)
    (state / "join").symlink_to(root / "etc")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        list(install(root, source=root / "boot/firmware/bmoe", board=None, program=None))
    assert {path.stat().st_uid for path in (root / "etc").rglob("*")} == {0}
    assert not (root / "etc/token").exists() and (root / "boot/firmware/bmoe/token").exists()


# Destroying.


def test_a_secret_is_overwritten_where_it_lies_before_its_name_goes(tmp_path: Path) -> None:
    path, second = tmp_path / "token", tmp_path / "second name for the same blocks"
    path.write_bytes(b"secret" * 100)
    os.link(path, second)
    shred(path)
    assert not path.exists() and second.read_bytes() == bytes(600)
    shred(path)


def test_a_link_is_not_followed_to_be_destroyed(tmp_path: Path) -> None:
    victim = tmp_path / "passwd"
    victim.write_text("root's own")
    (tmp_path / "token").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        shred(tmp_path / "token")
    blank(tmp_path / "token", b"root")
    assert victim.read_text() == "root's own"


def test_only_the_secrets_bytes_change_however_often_it_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "user-data"
    path.write_bytes(b"a SECRET b SECRETSECRET c")
    number = path.stat().st_ino
    blank(path, b"SECRET")
    assert path.read_bytes() == b"a xxxxxx b xxxxxxxxxxxx c" and path.stat().st_ino == number


# A power cut at each step of taking the token.


class PowerCutError(Exception):
    """The process is gone."""


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be gone before its step of that number."""
    count = 0

    def counted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def until_the_cut(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count > step:
                raise PowerCutError
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, until_the_cut)

    for name in ("put", "drop", "blank", "shred"):
        counted(boot_token, name)
    for name in ("put", "write_durably", "sync_folder"):
        counted(installing, name)


def holders(board: Path) -> set[str]:
    """The files that the token is in."""
    files = [path for path in board.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    return {str(path.relative_to(board)) for path in files}


def test_a_power_cut_at_any_step_of_an_install_is_made_good_by_the_next(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is durable when it returns, so what a cut leaves is what was done until then. As long as a copy of the
    token is left the card has it, or the next boot would not look for copies."""

    def installed(board: Path) -> dict[str, bytes]:
        list(install(board, source=board / "boot/firmware/bmoe", board="jetson-orin-nano", program=None))
        files = [path for path in board.rglob("*") if not path.is_dir()]
        return {
            str(p.relative_to(board)): p.readlink().name.encode() if p.is_symlink() else p.read_bytes() for p in files
        }

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here is really cut, and these are most of the time
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    expected = installed(whole)
    for step in range(100):
        board = tmp_path / str(step)
        shutil.copytree(root, board)
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            with contextlib.suppress(PowerCutError):
                installed(board)
                break
        with_token = holders(board)
        assert "boot/firmware/bmoe/token" in with_token or with_token == {"var/lib/bmoe-agent/join/token"}
        assert installed(board) == expected and holders(board) == {"var/lib/bmoe-agent/join/token"}
    assert step > len(COPIES) + 8


@pytest.mark.parametrize("left", [b"", bytes(120), b"\0\0\n"])
def test_a_token_that_was_overwritten_but_whose_name_came_back_holds_nothing_up(root: Path, left: bytes) -> None:
    """The power went before the folder of a FAT was written."""
    (root / "boot/firmware/bmoe/token").write_bytes(left)
    list(install(root, source=root / "boot/firmware/bmoe", board=None, program=None))
    assert not (root / "boot/firmware/bmoe/token").exists() and not (root / "var/lib/bmoe-agent/join/token").exists()


def test_a_card_that_cannot_be_written_is_told_of(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A FAT with an error in it is mounted read-only; here as os.open says it."""
    real = os.open

    def read_only(path: os.PathLike[str] | str, flags: int, *rest: object, **more: object) -> int:
        if "boot/firmware" in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: read_only(path, os.O_WRONLY))
    assert cli.run_command(["install", "--root", str(root), "--token"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("Read-only file system" in line for line in told)
    assert "the token may still be in" in told[-1] and told[-1].count("bmoe/token") == 1
    assert (root / "var/lib/bmoe-agent/join/token").exists(), "the board joins with it all the same"


def test_an_earlier_tokens_name_is_not_the_next_ones(root: Path) -> None:
    take_token(root)
    (root / "boot/firmware/bmoe/token").write_text(SECRET)
    (root / "boot/firmware/bmoe/name").unlink()
    take_token(root)
    assert os.listdir(root / "var/lib/bmoe-agent/join") == ["token"]
