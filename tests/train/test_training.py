"""The wearable model can be made again: the real script trains, exports and calibrates; ONNX and torch agree.

Run by `make test-train`, in an environment with torch, onnx and seglearn.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import by_path

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("onnx", reason="exporting needs onnx")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort  # noqa: E402

from bmoe.storage.manifest import Expert, Model, load_model, parts, read_part  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WEARABLE = ROOT / "models" / "wearable"
EPOCHS = "1"


def retrain(out: Path) -> str:
    """Runs the script as a person would; returns what it printed."""
    command = [sys.executable, str(WEARABLE / "train.py"), "--epochs", EPOCHS, "--out", str(out), "--version", "7"]
    command += ["--weights", str(out.with_suffix(".pt"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def recordings() -> ModuleType:
    torch.set_num_threads(1)
    return by_path(WEARABLE / "data.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recordings: ModuleType) -> Path:
    try:
        recordings.held_out()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("training") / "wearable"
    assert "wrote wearable version 7" in retrain(out)
    return out


@pytest.fixture(scope="module")
def mixture(trained: Path) -> Any:
    network = by_path(WEARABLE / "network.py")
    made = network.Mixture(torch.zeros(network.AXES), torch.ones(network.AXES))
    made.load_state_dict(torch.load(trained.with_suffix(".pt"), weights_only=True))
    return made.eval()


def infer(folder: Path, expert: Expert, window: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(read_part(folder, expert)).run(None, {"window": window})[0]


def bodies(model: Model, mixture: Any) -> list[tuple[Expert, Any]]:
    assert model.gate
    return [(model.gate, mixture.gate), *zip(model.experts, mixture.experts, strict=True)]


def test_a_retrained_model_is_a_true_model(trained: Path) -> None:
    model = load_model(trained)
    committed = load_model(WEARABLE)
    assert (model.version, model.name, model.labels) == (7, committed.name, committed.labels)
    assert [expert.inputs for expert in model.experts] == [expert.inputs for expert in committed.experts]
    assert [expert.sha256 for expert in model.experts] != [expert.sha256 for expert in committed.experts]


def test_onnx_and_torch_agree_within_epsilon(trained: Path, mixture: Any, recordings: ModuleType) -> None:
    window = recordings.held_out()[0][:300]
    for expert, body in bodies(load_model(trained), mixture):
        with torch.no_grad():
            expected = torch.softmax(body(torch.from_numpy(window)), dim=1).numpy()
        difference = np.abs(infer(trained, expert, window).astype(np.float64) - expected).max()
        assert 4 * difference <= expert.outputs[0].epsilon, f"{expert.name}: {difference}"


def test_one_epoch_already_learns(trained: Path, mixture: Any, recordings: ModuleType) -> None:
    window, label = recordings.held_out()
    with torch.no_grad():
        mixed, _ = mixture(torch.from_numpy(window))
    accuracy = float((mixed.argmax(1).numpy() == label).mean())
    assert accuracy > 0.4, "seven classes: guessing gives 0.14"


def test_training_twice_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    retrain(tmp_path / "again")
    for path in sorted(trained.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_half_precision_cheat_is_outside_epsilon(trained: Path, mixture: Any, recordings: ModuleType) -> None:
    window = torch.from_numpy(recordings.held_out()[0][:64])
    expert, body = bodies(load_model(trained), mixture)[1]
    with torch.no_grad():
        honest = torch.softmax(body(window), dim=1).double()
        for weight in body.parameters():
            weight.copy_(weight.half().float())
        cheat = torch.softmax(body(window), dim=1).double()
    assert (honest - cheat).abs().max() > 2 * expert.outputs[0].epsilon


def test_committed_files_carry_the_digests_of_the_manifest() -> None:
    for part in parts(load_model(WEARABLE)):
        assert hashlib.sha256((WEARABLE / part.file).read_bytes()).hexdigest() == part.sha256


FASHION = ROOT / "models" / "fashion"


def test_the_fashion_model_can_be_made_again_where_its_pictures_are(tmp_path: Path) -> None:
    """Shortly: 4,000 pictures, one epoch. Its input are the bytes of a picture, so the graph casts them itself."""
    pictures = by_path(FASHION / "data.py")
    try:
        image, label = pictures.held_out()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    command = [sys.executable, str(FASHION / "train.py"), "--epochs", "1", "--rows", "4000", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    model = load_model(tmp_path)
    assert (len(model.experts), model.top_k, model.labels) == (10, 3, pictures.LABELS)
    said = ort.InferenceSession(read_part(tmp_path, model.experts[0])).run(None, {"image": image[:500]})[0]
    assert said.shape == (500, 10) and np.allclose(said.sum(axis=1), 1, atol=1e-5)
    assert float((said.argmax(axis=1) == label[:500]).mean()) > 0.3, "guessing gives 0.1"
