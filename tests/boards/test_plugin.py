"""The pytest plugin and `bmoe emulate` as a user has them: a project outside the checkout, the wheel, an ONNX file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ours import build_wheel
from sample_models import SAMPLES, write

THEIR_TEST = '''
"""Our expert on a Raspberry Pi 4, before there is one."""

from pathlib import Path

import numpy as np

MODEL = Path(__file__).parent / "our-model"
X = np.linspace(-1, 1, 8 * 32, dtype=np.float32).reshape(8, 32)


def test_the_board_is_no_x86(emulated_board):
    import subprocess

    board = emulated_board("rpi4")
    done = subprocess.run([board.python, "-c", "import platform; print(platform.machine())"], capture_output=True)
    assert done.stdout == b"aarch64\\n"


def test_our_expert_gives_scores(emulated_board):
    (scores,) = emulated_board("rpi4").run(MODEL / "expert.onnx", {"x": X}).values()
    assert scores.shape == (8, 10) and np.isfinite(scores).all()


def test_a_fleet_serves_it(fleet, emulated_board):
    fleet.add("pi", emulated_board("rpi4"))
    fleet.add("native")
    name = fleet.publish(MODEL)
    fleet.online()
    answer = fleet.client().infer(name, {"x": X}, policy="full")
    assert answer.assurance == "verified" and answer.outputs["y"].shape == (8, 10)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch project: env/ with the wheel and pytest, our-model/expert.onnx, test_boards.py."""
    folder = tmp_path_factory.mktemp("scratch")
    wheel = build_wheel(folder)
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    run(folder / "env/bin/pip", "install", "-q", f"bmoe[gateway] @ {wheel.as_uri()}", "pytest", cwd=folder)
    (folder / "our-model").mkdir()
    sample = next(sample for sample in SAMPLES if sample.name == "mlp-fp32")
    write(sample, folder / "our-model").rename(folder / "our-model" / "expert.onnx")
    (folder / "test_boards.py").write_text(THEIR_TEST)
    return folder


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """Run to the end in a user's environment: no path of the checkout, no settings of ours but the cache's place."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BMOE", "PYTHONPATH", "VIRTUAL_ENV", "PYTEST"))}
    kept |= {k: v for k, v in os.environ.items() if k == "BMOE_EMULATE_CACHE"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_a_project_of_its_own_tests_its_expert_on_a_board(project: Path) -> None:
    assert "3 passed" in run(project / "env/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)


def test_the_command_says_how_far_a_board_is_from_here(project: Path) -> None:
    """Exit status 0 and both tables for a model that agrees; 1 for one whose tolerance allows less than the drift."""
    bmoe = project / "env/bin/bmoe"
    run(bmoe, "model", "init", "our-model", cwd=project)
    said = run(bmoe, "emulate", "--board", "rpi4", "--model", "our-model", cwd=project)
    assert "boards and this machine agree" in said and "Raspberry Pi 4 Model B Rev 1.4" in said


def test_what_cannot_be_emulated_is_one_line(project: Path) -> None:
    bmoe = project / "env/bin/bmoe"
    for board, words in (("generic-x86-64", "cannot be emulated"), ("rpi9", "there is no board 'rpi9'")):
        said = run(bmoe, "emulate", "--board", board, "--model", "our-model", cwd=project, code=2)
        assert words in " ".join(said.split()) and "Traceback" not in said
    np.savez(project / "wrong.npz", z=np.zeros(1))
    said = run(bmoe, "emulate", "--board", "rpi4", "--model", "our-model", "--inputs", "wrong.npz", cwd=project, code=2)
    assert "holds no array 'x'" in " ".join(said.split())
