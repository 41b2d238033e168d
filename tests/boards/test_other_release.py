"""The packages of the other Debian release, fetched from this machine's own mirrors, make boards that compute the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from sample_models import OUTPUT, SAMPLES, write

from coordinator.emulate import apt
from coordinator.emulate.compute import compute
from coordinator.emulate.sysroot import SUITES
from coordinator.emulate.workshop import Workshop

OTHER = {"bookworm": "trixie", "trixie": "bookworm"}


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The other release: this machine says that it is one of it, and its mirrors are asked for that one's suites."""
    own = apt.codename(apt.OS_RELEASE.read_text())
    other = OTHER[own]
    lines = [
        f"deb {f'[signed-by={source.keyring}] ' if source.keyring else ''}{source.uri} "
        f"{source.suite.replace(own, other)} main\n"
        for source in apt.machine_sources(own)
    ]
    (tmp_path / "apt").mkdir()
    (tmp_path / "apt" / "sources.list").write_text("".join(lines))
    (tmp_path / "os-release").write_text(f"ID=debian\nVERSION_CODENAME={other}\n")
    monkeypatch.setattr(apt, "SOURCES", tmp_path / "apt")
    monkeypatch.setattr(apt, "OS_RELEASE", tmp_path / "os-release")
    return other


def test_a_board_of_the_other_release_computes_the_same(release: str, tmp_path: Path) -> None:
    board = Workshop(tmp_path / "boards", print).board("rpi4")
    told = subprocess.run(
        [board.python, "-c", "import sys; print(sys.version_info[:2], sys.executable)"], capture_output=True, text=True
    )
    version = tuple(map(int, SUITES[release].python.split(".")))
    assert told.stdout.strip() == f"{version} {board.python}", told.stderr
    jobs = [(write(sample, tmp_path), sample.inputs()) for sample in SAMPLES if sample.name in ("mlp-fp32", "cnn-int8")]
    for here, there in zip(compute("", jobs), compute(str(board.python), jobs), strict=True):
        assert here[OUTPUT].tobytes() == there[OUTPUT].tobytes()


def test_an_agent_starts_on_it(release: str, tmp_path: Path) -> None:
    board = Workshop(tmp_path / "boards", print).board("rpi5")
    done = subprocess.run([*board.agent, "run", "--state", str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "none") in done.stderr
