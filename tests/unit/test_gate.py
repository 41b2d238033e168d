"""The gate as people have it: a label beside the scores, some of the model's inputs alone, a fixed batch of one."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
from inference_helpers import tensor

from bmoe.inference.runner import Runner
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import InferenceError
from bmoe.protocol.messages import ModelRelease, Release
from bmoe.protocol.tensors import Tensor
from coordinator.gate import Gate
from coordinator.jobs import Request

COMMON: dict[str, Any] = {"ledger": bytes(16), "epoch": 0, "author": "registrar", "seq": 1, "issued_ms": 1}
EXPERTS = 3


def request_of(blobs: Path, gate: bytes, batch: bool, tensors: Sequence[Tensor], outputs: Any, rows: int) -> Request:
    """A request of a model whose gate takes `x` alone, whatever else its experts take."""
    digest = hashlib.sha256(gate).digest()
    (blobs / digest.hex()).write_bytes(gate)
    release = Release(
        **COMMON, model="toy", expert_name="gate", digest=digest, size=len(gate), opset=17, memory_mb=64, batch=batch,
        inputs=(("x", "float32", (0, 4) if batch else (1, 4)),), outputs=outputs, owner="owner",
    )  # fmt: skip
    statement = ModelRelease(
        **COMMON, model="toy", version=1, manifest=bytes(32), gate=digest, experts=(bytes(32),) * EXPERTS, top_k=2,
        combine="weighted_sum", cacheable=False,
    )  # fmt: skip
    model = ReleasedModel(statement, release, (release,) * EXPERTS)
    return Request(bytes(16), "public", model, tuple(tensors), rows, "referee", "decided", "", 1)


def spec(name: str, dtype: str, dims: tuple[int, ...]) -> tuple[str, str, tuple[int, ...], bytes]:
    return name, dtype, dims, struct.pack(">d", 1e-5 if dtype.startswith("float") else 0.0)


async def test_scores_are_taken_beside_a_label_and_inputs_for_the_experts_alone_are_kept_from_the_gate(
    tmp_path: Path,
) -> None:
    x = np.random.default_rng(1).standard_normal((5, 4), np.float32)
    outputs = (spec("probabilities", "float32", (0, EXPERTS)), spec("label", "int64", (0,)))
    tensors = [tensor("mask", np.ones((5, 2), bool)), tensor("x", x)]
    request = request_of(tmp_path, models.mlp(), True, tensors, outputs, 5)
    async with Runner(memory_mb=128) as runner:
        routing = await Gate(runner, tmp_path).score(request)
    assert routing.experts.shape == (5, 2) and np.allclose(routing.weights.sum(axis=1), 1)


async def test_a_gate_without_batch_scores_the_one_row_and_no_more(tmp_path: Path) -> None:
    gate, outputs = models.echo(models.FLOAT, (1, EXPERTS)), (spec("y", "float32", (1, EXPERTS)),)
    async with Runner(memory_mb=128) as runner:
        scored = Gate(runner, tmp_path)
        x = tensor("x", np.array([[0.2, 0.5, 0.3]], np.float32))
        routing = await scored.score(request_of(tmp_path, gate, False, [x], outputs, 1))
        assert routing.experts.tolist() == [[1, 2]]
        worse = tensor("x", np.array([[0.2, -0.5, 0.3]], np.float32))
        with pytest.raises(
            InferenceError, match=r"scores \[1, 3\] that are not finite weights, for each of 1 rows, of 3"
        ):
            await scored.score(request_of(tmp_path, gate, False, [worse], outputs, 1))
