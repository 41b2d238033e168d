"""What the agent reads of its board and its operator: health, settings, log lines, the command line, import budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bmoe.protocol.errors import ConfigError
from edge_agent import cli
from edge_agent.config import AgentSettings, load_settings
from edge_agent.health import CPU_PERCENT, MEMORY_FREE_MB, TEMPERATURE_MC, THROTTLED, Gauge, board, memory_mb
from edge_agent.logs import event
from edge_agent.service import only_one


def raspberry(root: Path, stat: str) -> None:
    files = {
        "proc/stat": stat,
        "proc/meminfo": "MemTotal: 3884352 kB\nMemFree: 1 kB\nMemAvailable: 2097152 kB\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_raspberry_tells_all_that_it_has(tmp_path: Path) -> None:
    raspberry(tmp_path, "cpu 100 0 100 700 100 0 0 0 0 0\ncpu0 1\n")
    gauge = Gauge(tmp_path)
    first = gauge.read()
    assert CPU_PERCENT not in first, "one reading says nothing of use"
    raspberry(tmp_path, "cpu 150 0 125 775 150 0 0 0 0 0\n")
    assert gauge.read() == {CPU_PERCENT: 38, TEMPERATURE_MC: 48312, MEMORY_FREE_MB: 2048, THROTTLED: 0x50005}
    assert board(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4"
    assert memory_mb(tmp_path) == 3793


def test_a_board_without_sensors_or_with_nonsense_tells_nothing_false(tmp_path: Path) -> None:
    assert Gauge(tmp_path).read() == {} and board(tmp_path) and memory_mb(tmp_path) == 0
    raspberry(tmp_path, "cpu a b c\n")
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").write_text("-40000")
    (tmp_path / "proc/meminfo").write_text("MemAvailable:\n")
    assert Gauge(tmp_path).read() == {THROTTLED: 0x50005}


def test_settings_come_from_flags_before_environment_before_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent.toml").write_text("queue_limit = 1\nmemory_mb = 100\nnice = 3\n")
    monkeypatch.setenv("BMOE_AGENT_QUEUE_LIMIT", "2")
    monkeypatch.setenv("BMOE_AGENT_MEMORY_MB", "200")
    found = load_settings(state=tmp_path, queue_limit=3, log_level=None)
    assert (found.queue_limit, found.memory_mb, found.nice, found.max_sessions) == (3, 200, 3, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("queue_limt = 1", "queue_limt"),
        ("queue_limit = 0", "queue_limit"),
        ("queue_limit = ", "cannot be read"),
        ('log_level = "loud"', "log_level"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "agent.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_settings(state=tmp_path)


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in AgentSettings.model_fields.values())


def test_a_hostile_text_cannot_forge_a_log_line() -> None:
    assert event("x", a=b"\x01\x02", b="plain", c='two words="\n') == 'event=x a=0102 b=plain c="two words=\'\\n"'
    assert "\n" not in event("x", detail="a\nevent=online\x1b[2J")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("run", "--state", "STATE"), 2, "has not joined"),
        (("run", "--state", "STATE", "--memory-mb", "1"), 2, "memory_mb"),
        (("run", "--state", "STATE", "--config", "/nowhere.toml"), 2, "no configuration file"),
        (("join", "hello", "--state", "STATE"), 2, "begins with 'bmoe1.'"),
        (("join", "bmoe1.AAAA", "--state", "STATE"), 2, "damaged or cut short"),
    ],
)
def test_a_wrong_command_gives_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, says: str
) -> None:
    assert cli.run_command([a.replace("STATE", str(tmp_path)) for a in arguments]) == status
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and err.startswith("bmoe-agent: ") and not out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"], ["join", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            cli.run_command(arguments)
        assert exit_.value.code == 0
    assert "first time on a board" in capsys.readouterr().out


def test_two_processes_cannot_serve_one_state_directory(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ConfigError, match="another bmoe-agent"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


HEAVY = ("torch", "flwr", "grpc", "fastapi", "uvicorn", "starlette", "typer", "rich", "tuf", "numpy", "onnxruntime", "nats",
         "coordinator", "tinydb", "structlog")  # fmt: skip


def test_the_agent_loads_nothing_that_a_board_need_not_hold() -> None:
    program = (
        f"import sys, edge_agent.service, edge_agent.cli\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
