"""The supervisor with processes of our own: what they report, how they fail, and what their logs tell."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from embedded_servers import Events

from bmoe.protocol.errors import UnavailableError
from coordinator.embedded.logtail import LogTail
from coordinator.embedded.supervisor import Child, Supervisor


def python_child(tmp_path: Path, code: str, **more: Any) -> Child:
    prelude = "import os, signal, sys, time; from coordinator.embedded.ready import notify_ready\n"
    return Child("ours", (sys.executable, "-c", prelude + code), tmp_path / "ours.log", **more)


async def test_own_process_reports_facts_and_is_restarted_with_growing_delays(tmp_path: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        child = python_child(tmp_path, "notify_ready(port=7); sys.exit(3)", env={"PYTHONPATH": os.getcwd()})
        assert await supervisor.start(child) == {"port": 7}
        assert (await events.wait_for("ours", "exited")).code == 3
        await events.wait_for("ours", "restarting", text="code 3; next start in 0.2 s")
        await events.wait_for("ours", "restarting", text="code 3; next start in 0.4 s")


async def test_child_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        with pytest.raises(UnavailableError, match=r"exited with code 1 before it was ready(.|\n)*no such model"):
            await supervisor.start(python_child(tmp_path, "sys.exit('no such model')"))
        with pytest.raises(UnavailableError, match=r"not ready within 0\.3 s"):
            await supervisor.start(python_child(tmp_path, "time.sleep(60)", ready_within=0.3))
        with pytest.raises(UnavailableError, match="cannot run /no/such/program"):
            await supervisor.start(Child("ours", ("/no/such/program",), tmp_path / "ours.log"))
        assert supervisor.pids() == {}


async def test_child_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); notify_ready(); time.sleep(60)"
        await supervisor.start(python_child(tmp_path, deaf, grace=0.2))
    assert (await events.wait_for("ours", "exited")).code == -signal.SIGKILL


def test_alarms_are_followed_through_a_rotation_and_a_flood(tmp_path: Path) -> None:
    log = tmp_path / "nats.log"
    log.write_text("[ERR] of an earlier run\n")
    tail = LogTail(log)
    with log.open("a") as file:
        file.write("[INF] fine\n[ERR] one\n[WRN] half")
        file.flush()
        assert tail.poll() == ["[ERR] one"]
        file.write(" and half\n")
    log.rename(tmp_path / "nats.log.2026")
    log.write_text("[ERR] in the new file\n")
    assert tail.poll() == ["[WRN] half and half", "[ERR] in the new file"]
    with log.open("a") as file:
        file.write("[ERR] flood\n" * 60)
    told = tail.poll()
    assert (len(told), told[-1]) == (50, f"... and 11 more lines, see {log}")
    tail.close()
