"""Experts in their child process: right answers, refused files and inputs, and what the child may see and do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
from inference_helpers import (
    MEMORY_MB,
    Store,
    assert_serves,
    in_process,
    rows,
    tensor,
)

from bmoe.inference import sessions
from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import ConfigError, InferenceError, InputError, ModelError
from bmoe.protocol.tensors import Tensor


async def test_outputs_are_bit_for_bit_those_of_onnxruntime_in_the_sessions_order(runner: Runner, store: Store) -> None:
    expert, x = store(models.mlp()), rows(17)
    result = await runner.run(expert, [tensor("x", x)], timeout_s=30)
    probabilities, label = in_process(models.mlp(), {"x": x})
    assert result.outputs == (tensor("probabilities", probabilities), tensor("label", label))
    assert result.provider == "CPUExecutionProvider"
    assert 0 < result.duration_us < 30_000_000


async def test_tensors_of_each_dtype_and_of_no_rows_come_back_unchanged(runner: Runner, store: Store) -> None:
    for dtype, element in models.ELEMENT_TYPES.items():
        expert = store(models.echo(element))
        for count in (3, 0):
            array = np.arange(count * 2).astype(dtype).reshape(count, 2)
            result = await runner.run(expert, [tensor("x", array)], timeout_s=30)
            assert result.outputs == (tensor("y", array),)


async def test_scalars_unknown_ranks_and_megabytes_pass_through(runner: Runner, store: Store) -> None:
    anything = store(models.echo(dims=None))
    for array in (np.array(2.5, np.float32), rows(300_000, 4)):
        result = await runner.run(anything, [tensor("x", array)], timeout_s=30)
        assert result.outputs == (tensor("y", array),)


async def test_tasks_given_at_once_each_get_their_own_answer(runner: Runner, store: Store) -> None:
    experts = [(models.mlp(seed=seed), store(models.mlp(seed=seed))) for seed in range(3)]
    batches = [rows(5, seed=seed) for seed in range(12)]
    results = await asyncio.gather(
        *(runner.run(experts[i % 3][1], [tensor("x", x)], timeout_s=30) for i, x in enumerate(batches))
    )
    for i, (x, result) in enumerate(zip(batches, results, strict=True)):
        assert result.outputs[0].data == in_process(experts[i % 3][0], {"x": x})[0].tobytes()


async def test_a_file_that_is_not_the_expert_asked_for_is_refused(runner: Runner, store: Store) -> None:
    expert, other = store(models.mlp()), store(models.mlp(seed=8))
    swapped = ExpertFile(expert.digest, other.path)
    with pytest.raises(ModelError, match=f"should have the SHA-256 {expert.digest.hex()}, it has {other.digest.hex()}"):
        await runner.run(swapped, [tensor("x", rows(1))], timeout_s=30)
    pid = runner.pid
    await assert_serves(runner, expert)
    assert runner.pid == pid


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot load it"),
        (b"not a model" * 50, "cannot load it"),
        (models.mlp()[:-40], "cannot load it"),
        (models.with_external_data("weights.bin"), "cannot load it"),
        (models.with_external_data("etc/hostname"), "cannot load it"),
        (models.with_external_data("/etc/hostname"), "cannot load it"),
        (models.with_external_data("../../etc/hostname"), "cannot load it"),
        (models.sequence_output(), r"output 'y' is a seq\(tensor\(float\)\), expected one of tensor"),
        (models.echo(models.STRING), r"input 'x' is a tensor\(string\), expected one of tensor"),
        (models.echo(dims=[1] * 9), "input 'x' has 9 dims, expected at most 8"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_single_file_tensor_model_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        sessions.open_expert(data)


async def test_garbage_missing_and_irregular_files_leave_the_worker_alive(
    runner: Runner, store: Store, tmp_path: Path
) -> None:
    good, garbage = store(models.mlp()), store(b"not a model")
    os.mkfifo(tmp_path / "fifo")
    await assert_serves(runner, good)
    pid = runner.pid
    for path, reason in (
        (garbage.path, "cannot load it"),
        (tmp_path / "fifo", "is not a regular file"),
        (tmp_path, "is not a regular file|Is a directory"),
        (tmp_path / "nothing", "No such file"),
    ):
        with pytest.raises(ModelError, match=reason):
            await runner.load(ExpertFile(garbage.digest, path))
    await assert_serves(runner, good)
    assert runner.pid == pid


REFUSED_INPUTS: list[tuple[list[Tensor], str]] = [
    ([tensor("x", rows(2, 5))], r"input 'x': expected float32\[N, 4\], got float32\[2, 5\]"),
    ([tensor("x", rows(1)[0])], r"input 'x': expected float32\[N, 4\], got float32\[4\]"),
    ([tensor("x", rows(2).astype("float64"))], r"input 'x': expected float32\[N, 4\], got float64\[2, 4\]"),
    ([tensor("z", rows(2))], r"expected the inputs \['x'\] once each, got 'z'"),
    ([tensor("\ud800", rows(2))], r"expected the inputs \['x'\] once each, got '\\\\ud800'"),
    ([tensor("x", rows(2)), tensor("x", rows(2))], r"expected the inputs \['x'\] once each, got 'x'"),
    ([], r"expected the inputs \['x'\], got \[\]"),
    ([tensor("x", rows(1))] * 300, "at most 255 tensors a side, got 300"),
]  # fmt: skip


async def test_inputs_the_expert_does_not_take_are_refused_with_what_was_expected(runner: Runner, store: Store) -> None:
    expert = store(models.mlp())
    await assert_serves(runner, expert)
    pid = runner.pid
    for inputs, reason in REFUSED_INPUTS:
        with pytest.raises(InputError, match=reason):
            await runner.run(expert, inputs, timeout_s=30)
    assert runner.pid == pid


async def test_values_an_expert_fails_on_fail_that_task_alone(runner: Runner, store: Store) -> None:
    table = store(models.gather())
    with pytest.raises(InferenceError, match=r"the expert failed: .*idx=9 must be within"):
        await runner.run(table, [tensor("index", np.array([1, 9]))], timeout_s=30)
    pid = runner.pid
    result = await runner.run(table, [tensor("index", np.array([3]))], timeout_s=30)
    assert result.outputs == (tensor("y", np.array([3], np.float32)),)
    assert runner.pid == pid


async def test_a_relative_path_is_the_parents(
    runner: Runner, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = store(models.mlp())
    monkeypatch.chdir(tmp_path)
    await assert_serves(runner, ExpertFile(expert.digest, Path(expert.path.name)))


async def test_the_longest_unused_expert_makes_room(store: Store) -> None:
    first, second, third = (store(models.mlp(seed=seed)) for seed in range(3))
    x = [tensor("x", rows(1))]
    async with Runner(memory_mb=MEMORY_MB, max_sessions=2) as runner:
        for expert in (first, second, first, third):
            await runner.run(expert, x, timeout_s=30)
        for expert in (first, second, third):
            expert.path.unlink()
        await runner.run(first, x, timeout_s=30)
        await runner.run(third, x, timeout_s=30)
        with pytest.raises(ModelError, match="No such file"):
            await runner.run(second, x, timeout_s=30)


async def test_the_worker_gets_no_secrets_writes_nothing_home_and_has_one_thread(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("BMOE_TOKEN", "secret")
    async with Runner(memory_mb=MEMORY_MB, nice=3) as runner:
        await assert_serves(runner, store(models.mlp()))
        environment = Path(f"/proc/{runner.pid}/environ").read_bytes()
        assert b"ORT_DISABLE_TELEMETRY=1" in environment
        assert b"secret" not in environment and bytes(home) not in environment
        assert len(os.listdir(f"/proc/{runner.pid}/task")) == 1
        assert os.getpriority(os.PRIO_PROCESS, runner.pid or 0) == min(os.getpriority(os.PRIO_PROCESS, 0) + 3, 19)
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("settings", [{"memory_mb": 0}, {"max_sessions": 0}])
def test_settings_that_allow_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Runner(**settings)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("bmoe.inference.runner", ["numpy", "onnxruntime", "paho", "pydantic", "cryptography", "cbor2"]),
        ("bmoe.inference.worker", ["asyncio", "paho", "pydantic", "cryptography", "cbor2"]),
    ],
)
def test_each_side_keeps_its_import_budget(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
