"""Execution providers: which one a session gets, under which options, and that the one used is the one named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx_models as models
import pytest
from inference_helpers import MEMORY_MB, in_process, put, rows, tensor

from bmoe.inference.providers import BOUNDED, CPU, ENVIRONMENT, OPTIONS, present, with_options
from bmoe.inference.runner import Runner, child_environment

CUDA, TENSORRT, XNNPACK = (f"{name}ExecutionProvider" for name in ("CUDA", "Tensorrt", "Xnnpack"))


@pytest.mark.parametrize(
    ("wanted", "available", "got"),
    [
        ([CPU], [CPU, "AzureExecutionProvider"], [CPU]),
        ([TENSORRT, CUDA, CPU], [CUDA, CPU], [CUDA, CPU]),
        ([XNNPACK], [XNNPACK, CPU], [XNNPACK, CPU]),
        ([CUDA], [CPU], [CPU]),
        ([CPU, CUDA], [CUDA, CPU], [CUDA, CPU]),
        ([CUDA, CUDA], [CUDA, CPU], [CUDA, CPU]),
        ([], [CPU], [CPU]),
    ],
)
def test_the_wanted_that_are_there_in_their_order_and_the_processor_last(
    wanted: list[str], available: list[str], got: list[str]
) -> None:
    assert present(wanted, available) == got


def test_nothing_computes_in_less_than_it_was_given() -> None:
    """TF32 and half precision differ from other boards by a thousand tolerances."""
    assert OPTIONS[CUDA]["use_tf32"] == "0" and OPTIONS[TENSORRT]["trt_fp16_enable"] is False
    assert ENVIRONMENT["NVIDIA_TF32_OVERRIDE"] == child_environment()["NVIDIA_TF32_OVERRIDE"] == "0"
    assert with_options([CUDA, CPU])[1] == (CPU, {}) and not {CUDA, TENSORRT} & set(BOUNDED)


async def test_a_provider_that_is_not_there_is_left_out_and_the_one_used_is_named(tmp_path: Path) -> None:
    expert, x = put(tmp_path, models.mlp()), rows(5)
    async with Runner(memory_mb=MEMORY_MB, threads=2, providers=(TENSORRT, CUDA, CPU)) as runner:
        result = await runner.run(expert, [tensor("x", x)], timeout_s=30)
        assert runner.provider == result.provider == CPU
    assert result.outputs[0] == tensor("probabilities", in_process(models.mlp(), {"x": x})[0])


def test_importing_it_reports_nothing_home(tmp_path: Path) -> None:
    """Some wheels of onnxruntime leave a device id below HOME at the first session, unless told not to before the import."""
    (tmp_path / "model.onnx").write_bytes(models.mlp())
    program = (
        "import os, sys; from bmoe.inference import sessions\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "sessions.open_expert(open(sys.argv[1], 'rb').read())"
    )
    hidden = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    home = tmp_path / "home"
    home.mkdir()
    words = [sys.executable, "-c", program, str(tmp_path / "model.onnx")]
    root = str(Path(__file__).parents[2])
    subprocess.run(words, env={**kept, "HOME": str(home), "PYTHONPATH": root}, check=True, timeout=60)
    assert list(home.rglob("*")) == []
