"""A model of one's own, one expert and no gate, on a gateway that listens on one card's address.

Its outputs are larger than what rides in a frame, so they go through the evidence store, and validators fetch them.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import numpy as np

from benchmarks.fleet import AgentSpec, LocalFleet
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.storage.manifest import Expert, Model, TensorSpec, render_manifest
from coordinator.state_layout import StateLayout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
import onnx_models

COLUMNS = 20_000
ROWS = 3


def write_model(folder: Path) -> None:
    """An expert that gives back what it is given: float32 [N, 20000], 80 kB a row."""
    data = onnx_models.echo(onnx_models.FLOAT, ("N", COLUMNS))
    folder.mkdir()
    (folder / "echo.onnx").write_bytes(data)
    spec = TensorSpec("x", "float32", (None, COLUMNS))
    expert = Expert(
        name="echo", file="echo.onnx", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), opset=17, memory_mb=16,
        batch=True, inputs=(spec,), outputs=(TensorSpec("y", "float32", (None, COLUMNS), 1e-6),),
    )  # fmt: skip
    model = Model(
        format=1, name="echo", version=1, licence="Apache-2.0", description="gives back its input", top_k=1,
        combine="weighted_sum", labels=(), gate=None, experts=(expert,), cacheable=True,
    )  # fmt: skip
    (folder / "model.json").write_bytes(render_manifest(model))


async def test_a_model_of_ones_own_with_large_outputs_is_served_verified_and_audited(tmp_path: Path) -> None:
    write_model(tmp_path / "echo")
    flags = ("--model", str(tmp_path / "echo"), "--host", "127.0.0.2")
    agents = [AgentSpec("board-1", "owner-1"), AgentSpec("board-2", "owner-2")]
    async with LocalFleet(tmp_path / "fleet", agents, flags) as fleet:
        await fleet.start()
        x = np.random.default_rng(5).normal(size=(ROWS, COLUMNS)).astype(np.float32)
        client = fleet.client()
        answer = await asyncio.to_thread(lambda: client.infer("echo", {"x": x}, wait="final"))
        assert x[0].nbytes > INLINE_BYTES and np.array_equal(answer.outputs["y"], x)
        receipt = await asyncio.to_thread(client.receipt, answer.request)
        audited = verify_receipt(receipt, StateLayout(fleet.state).load_trust())
        assert audited.entry.request.hex() == answer.request
        assert not audited.recomputed or audited.relied_on, "openings as large as these are not in the receipt"
        before = client.statistics()
        again = await asyncio.to_thread(lambda: client.infer("echo", {"x": x}, wait="final"))
        after = client.statistics()
        assert np.array_equal(again.outputs["y"], x) and again.verdicts == answer.verdicts, "its manifest allows it"
        assert (after["cache_hits"], after["tasks"]) == (before["cache_hits"] + 1, before["tasks"])
        assert again.request != answer.request, "an answer of its own on the ledger, on the same verdict"
        audited = verify_receipt(
            await asyncio.to_thread(client.receipt, again.request), StateLayout(fleet.state).load_trust()
        )
        assert audited.entry.request.hex() == again.request
        other = await asyncio.to_thread(lambda: client.infer("echo", {"x": x + 1}))
        assert np.array_equal(other.outputs["y"], x + 1) and other.verdicts != answer.verdicts
