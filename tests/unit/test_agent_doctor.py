"""`bmoe-agent doctor`: well, not enrolled, an expired certificate, a clock that is off, a wheel for another processor."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_gateway import FleetServer
from test_agent_board import raspberry
from test_agent_join import joined

from edge_agent import cli, clock, config, doctor
from edge_agent.config import load_settings
from edge_agent.doctor import Finding, examine
from edge_agent.enrol import token_file


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FleetServer]:
    async with FleetServer(tmp_path / "gateway").running() as server:
        yield server


async def found(state: Path, root: Path = Path("/")) -> dict[str, Finding]:
    settings = load_settings(state=state)
    return {finding.name: finding for finding in await asyncio.to_thread(examine, settings, root)}


async def test_a_board_in_good_health(server: FleetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await joined(tmp_path / "board", server.token(), "kitchen-pi")
    root = tmp_path / "root"
    raspberry(root, "cpu 0\n")
    (root / "sys/devices/platform/soc/soc:firmware/get_throttled").write_text("0\n")
    told = await found(tmp_path / "board", root)
    assert [f.line() for f in told.values() if f.ok is False] == []
    assert {name for name, finding in told.items() if finding.ok} == {
        "clock", "disk", "enrolment", "gateway", "membership", "certificate", "onnxruntime", "temperature", "memory",
    }  # fmt: skip
    assert "ran a model on CPUExecutionProvider" in told["onnxruntime"].text and "48 C" in told["temperature"].text


async def test_each_fault_is_one_line_that_says_what_to_do(
    server: FleetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await joined(tmp_path / "board", server.token(), "kitchen-pi")
    (tmp_path / "board/agent.toml").write_text('providers = ["CUDAExecutionProvider"]\n')
    root = tmp_path / "root"
    raspberry(root, "cpu 0\n")
    (root / "dev").mkdir()
    (root / "dev/watchdog0").touch()
    (root / "sys/class/watchdog/watchdog0").mkdir(parents=True)
    (root / "sys/class/watchdog/watchdog0/state").write_text("inactive\n")
    year = 365 * 86400
    true = clock.now_s()
    monkeypatch.setattr(clock, "now_s", lambda: true + year)
    monkeypatch.setattr(doctor, "over", lambda path: "2026-01-31")
    told = await found(tmp_path / "board", root)
    for name, says in {
        "clock": "from the gateway's: set it",
        "certificate": "expired 2026-01-31: it cannot be renewed any more: get a new token, then bmoe-agent join",
        "onnxruntime": "not to be had here: CUDAExecutionProvider",
        "temperature": "throttled (firmware bits 0x50005)",
        "watchdog": "set RuntimeWatchdogSec",
    }.items():
        assert told[name].ok is False and says in told[name].text, told[name]
        assert "\n" not in told[name].line()


async def test_a_wheel_that_is_not_for_this_processor_is_found_out_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -ILL $$\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(doctor.sys, "executable", str(fake))
    told = await found(tmp_path / "board")
    assert told["onnxruntime"].ok is False and "dies by SIGILL" in told["onnxruntime"].text


async def test_a_board_that_has_not_joined_says_so_and_one_with_a_token_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda providers: ("0", ["CPUExecutionProvider"]))
    told = await found(tmp_path / "board")
    assert told["enrolment"].ok is False and "bmoe-agent join TOKEN" in told["enrolment"].text
    token_file(tmp_path / "board").parent.mkdir(parents=True)
    token_file(tmp_path / "board").write_text("bmoe1.AAAA\n")
    assert (await found(tmp_path / "board"))["enrolment"].ok is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    await found(tmp_path / "board")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "it changes nothing"


async def test_a_floor_that_was_ahead_is_no_fault_where_the_gateway_agrees_with_the_clock(
    server: FleetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda providers: ("0", ["CPUExecutionProvider"]))
    await joined(tmp_path / "board", server.token())
    clock.save(tmp_path / "board", clock.now_s() + 86400)
    assert (await found(tmp_path / "board"))["clock"].ok is True


async def test_a_board_too_slow_for_the_model_costs_no_other_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(fake))
    monkeypatch.setattr(doctor, "PROBE_S", 0.1)
    told = await found(tmp_path / "board")
    assert told["onnxruntime"].ok is False and "did not run a small model within 0.1 s" in told["onnxruntime"].text
    assert list(told) == list(doctor.CHECKS)


async def test_nothing_of_the_folder_that_it_is_called_in_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root calls it in /tmp, where anybody may have put a json.py; Python 3.10 would take that."""
    (tmp_path / "json.py").write_text("raise SystemExit('taken over')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "child_environment", lambda: {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    assert (await found(tmp_path / "board"))["onnxruntime"].ok is True


def test_who_may_not_read_the_agents_directory_is_told_whom_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it were said of a board that has joined that it has not."""
    link = tmp_path / "bmoe-agent"
    link.symlink_to("private/bmoe-agent")
    monkeypatch.setattr(config, "SYSTEM_STATE", link)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != link)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own"))
    assert config.default_state() == tmp_path / "own/bmoe-agent"
    assert cli.run_command(["doctor"]) == 2
    assert capsys.readouterr().err.endswith("can be read by root and the agent alone: sudo bmoe-agent doctor\n")


def test_the_exit_status_and_the_object_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def well(patient: doctor.Patient) -> tuple[bool | None, str]:
        return True, "two\nlines"

    def unforeseen(patient: doctor.Patient) -> tuple[bool | None, str]:
        raise LookupError("the bus is on fire")

    monkeypatch.setattr(doctor, "CHECKS", {"one": well})
    assert cli.run_command(["doctor", "--state", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "ok   one          two lines\n"
    monkeypatch.setattr(doctor, "CHECKS", {"one": well, "two": unforeseen})
    assert cli.run_command(["doctor", "--state", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and told["checks"][1] == {
        "check": "two",
        "ok": False,
        "text": "LookupError: the bus is on fire",
    }
    assert os.listdir(tmp_path) == []
