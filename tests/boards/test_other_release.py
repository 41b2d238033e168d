"""The packages of the other Debian release, fetched from this machine's own mirrors, make boards that compute the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_models import OUTPUT, SAMPLES, write

from coordinator.emulate import apt
from coordinator.emulate.compute import compute
from coordinator.emulate.sysroot import recipe
from coordinator.emulate.workshop import Workshop

OTHER = {"bookworm": "trixie", "trixie": "bookworm"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """On a machine that says that it is of the other release, and asks its own mirrors for that one's suites."""
    folder, own = tmp_path_factory.mktemp("release"), apt.codename(apt.OS_RELEASE.read_text())
    lines = [
        f"deb {f'[signed-by={source.keyring}] ' if source.keyring else ''}{source.uri} "
        f"{source.suite.replace(own, OTHER[own])} main\n"
        for source in apt.machine_sources(own)
    ]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "os-release").write_text(f"ID=debian\nVERSION_CODENAME={OTHER[own]}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apt, "SOURCES", folder)
        patch.setattr(apt, "OS_RELEASE", folder / "os-release")
        yield Workshop(folder / "boards", print)


def test_a_board_of_the_other_release_computes_the_same(workshop: Workshop, tmp_path: Path) -> None:
    board = workshop.board("rpi4")
    told = subprocess.run(
        [board.python, "-c", "import sys; print(sys.version_info[:2], sys.executable)"], capture_output=True, text=True
    )
    version = tuple(map(int, recipe().suite.python.split(".")))
    assert told.stdout.strip() == f"{version} {board.python}", told.stderr
    jobs = [(write(sample, tmp_path), sample.inputs()) for sample in SAMPLES if sample.name in ("mlp-fp32", "cnn-int8")]
    for here, there in zip(compute("", jobs), compute(str(board.python), jobs), strict=True):
        assert here[OUTPUT].tobytes() == there[OUTPUT].tobytes()


def test_its_agent_starts(workshop: Workshop, tmp_path: Path) -> None:
    """As far as it can without having joined, which it says."""
    words = [*workshop.board("rpi4").agent, "run", "--state", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "none") in done.stderr
