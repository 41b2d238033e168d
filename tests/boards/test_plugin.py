"""The plugin, the example workflow and the document's own example as a user has them: another project, the wheel alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ours import ROOT, build_wheel
from sample_models import SAMPLES, write

WORKFLOW = ROOT / "firmware_configs" / "examples" / "emulated-boards.yml"
DOCUMENT = ROOT / "docs" / "emulation.md"
# As hard to get on with as a project's settings may be: several processes, a running event loop, warnings as errors.
THEIR_SETTINGS = """
[pytest]
addopts = -q -n 2 --import-mode=importlib --strict-config --strict-markers -p no:cacheprovider
asyncio_mode = strict
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""
THEIR_TEST = '''
"""Our expert on a Raspberry Pi 4, before there is one."""

import asyncio
import subprocess
from pathlib import Path

import numpy as np
import pytest

X = np.linspace(-1, 1, 8 * 32, dtype=np.float32).reshape(8, 32)


def test_the_board_is_no_x86(emulated_board):
    board = emulated_board("rpi4")
    done = subprocess.run([board.python, "-c", "import platform; print(platform.machine())"], capture_output=True)
    assert done.stdout == b"aarch64\\n"


@pytest.mark.asyncio
async def test_within_an_event_loop(fleet, emulated_board):
    (scores,) = emulated_board("rpi4").run(Path("my-model/expert.onnx"), {"x": X}).values()
    fleet.add("native")
    name = fleet.publish(Path("my-model"))
    assert fleet.publish(Path("my-model")) == name  # again
    fleet.online()
    answer = await asyncio.to_thread(fleet.client().infer, name, {"x": X})
    assert answer.outputs["y"].shape == scores.shape == (8, 10)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as the example workflow wants it, its first line done: env/, wheels/, my-model/, tests/."""
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "wheels").mkdir()
    wheel = build_wheel(folder)
    wheel.rename(folder / "wheels" / wheel.name)
    run(f"{sys.executable} -m venv env", folder)
    install, _, _ = workflow_lines()
    run(f"{install} pytest-asyncio pytest-xdist --no-compile", folder)  # what is imported is compiled then
    (folder / "my-model").mkdir()
    sample = next(sample for sample in SAMPLES if sample.name == "mlp-fp32")
    write(sample, folder / "my-model").rename(folder / "my-model" / "expert.onnx")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_boards.py").write_text(THEIR_TEST)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    (folder / "tests" / "test_document.py").write_text(example)
    return folder


def workflow_lines() -> list[str]:
    """What the example workflow runs."""
    found = re.findall(r"^ +- run: (.+?)(?: +# .*)?$", WORKFLOW.read_text(encoding="utf-8"), re.M)
    assert [line.split()[0] for line in found] == ["pip", "python", "bmoe"]
    return found


def run(line: str, cwd: Path, code: int = 0) -> str:
    """Run a line in a user's environment: no path of the checkout, no settings of ours but the cache's place."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BMOE", "PYTHONPATH", "VIRTUAL_ENV", "PYTEST"))}
    kept |= {k: v for k, v in os.environ.items() if k == "BMOE_EMULATE_CACHE"}
    kept["PATH"] = os.pathsep.join([str(cwd / "env" / "bin"), os.environ["PATH"]])
    done = subprocess.run(line, shell=True, cwd=cwd, capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == code, f"{line}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_a_project_of_its_own_tests_its_expert_on_a_board(project: Path) -> None:
    """As plainly as can be, and by its own settings, the document's example word for word among its tests; both at once."""
    _, test, _ = workflow_lines()
    (project / "plain.ini").write_text("[pytest]\n")
    (project / "pytest.ini").write_text(THEIR_SETTINGS)
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(
            run, f"{test} -c plain.ini -p no:cacheprovider -p no:asyncio -p no:xdist -k no_x86", project
        )
        assert "4 passed" in run(test, project)
        assert "1 passed" in plain.result()


def test_the_command_says_how_far_a_board_is_from_here(project: Path) -> None:
    """Exit status 0 and both tables for a model that agrees; state and logs stay where they were wished."""
    run("bmoe model init my-model", project)
    _, _, emulate = workflow_lines()
    said = run(f"{emulate} --keep looked-at", project)
    assert "boards and this machine agree" in said and "Raspberry Pi 4 Model B Rev 1.4" in said
    assert (project / "looked-at" / "fleet" / "gateway.log").exists()
    assert "--keep wants a new folder" in run(f"{emulate} --keep looked-at", project, code=2)


def test_the_command_fails_where_a_tolerance_is_less_than_the_drift(project: Path) -> None:
    """Exit status 1, and it is named who differs."""
    shutil.copytree(project / "my-model", project / "strict")
    sample = next(sample for sample in SAMPLES if sample.name == "transcendental-fp32")
    write(sample, project / "strict").replace(project / "strict" / "expert.onnx")
    for scrap in ("model.json", *(path.name for path in (project / "strict").glob("*.npz"))):
        (project / "strict" / scrap).unlink()
    run("bmoe model init strict", project)
    manifest = project / "strict" / "model.json"
    manifest.write_text(re.sub(r'"epsilon": [0-9.e-]+', '"epsilon": 1e-12', manifest.read_text()))
    said = " ".join(run("bmoe emulate --board rpi4 --model strict", project, code=1).split())
    assert "boards and this machine do not agree: rpi4: expert" in said and "Traceback" not in said


def test_what_cannot_be_emulated_is_one_line(project: Path) -> None:
    for board, words in (("generic-x86-64", "cannot be emulated"), ("rpi9", "there is no board 'rpi9'")):
        said = run(f"bmoe emulate --board {board} --model my-model", project, code=2)
        assert words in " ".join(said.split()) and "Traceback" not in said
    np.savez(project / "wrong.npz", z=np.zeros(1))
    said = run("bmoe emulate --board rpi4 --model my-model --inputs wrong.npz", project, code=2)
    assert "holds no array 'x'" in " ".join(said.split())
