"""Models of one's own, and of the wild: ten of unlike exporters are published to a running gateway, and agents serve them.

Each answer is, bit for bit, what onnxruntime alone gives for the same input under the same session options.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx_models
import onnxruntime
import pytest
import pytest_asyncio
from wild_models import WILD, Arrays, Wild, write_mixture

from benchmarks.fleet import AgentSpec, LocalFleet
from bmoe.client import Client
from bmoe.inference import sessions
from bmoe.ledger.rules.combine import choose
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.protocol.errors import RefusedError
from bmoe.storage.manifest import MANIFEST_NAME, Expert, Model, TensorSpec, load_model, render_manifest
from coordinator.models.draft import Wishes, draft
from coordinator.models.publish import publish
from coordinator.models.trial import Lab
from coordinator.state_layout import StateLayout

MIXTURE = "mixture"
COLUMNS = 20_000
ROWS = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def published(tmp_path_factory: object) -> AsyncIterator[tuple[LocalFleet, Path]]:
    """A fleet that came up with one model of our own, on one card's address, and then had all the others published."""
    root: Path = tmp_path_factory.mktemp("wild")  # type: ignore[attr-defined]
    agents = [AgentSpec("board-1", "owner-1"), AgentSpec("board-2", "owner-2")]
    write_echo(root / "echo")
    async with LocalFleet(root / "fleet", agents, ("--model", str(root / "echo"), "--host", "127.0.0.2")) as fleet:
        await asyncio.gather(fleet.start(), _draft_all(root))
        for name in (*(wild.name for wild in WILD), MIXTURE):
            reply = await asyncio.to_thread(publish, fleet.state, root / name, "operator")
            assert (reply["model"], reply["version"]) == (name, 1) and reply["position"] > 0
        yield fleet, root


def write_echo(folder: Path) -> None:
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


async def _draft_all(root: Path) -> None:
    async def one(name: str, inputs: Path | None, lab: Lab) -> None:
        await draft(root / name, Wishes(inputs=inputs), lambda line: None, lab)

    async with Lab() as lab:
        drafts = []
        for wild in WILD:
            (root / wild.name).mkdir()
            await asyncio.to_thread(wild.write, root / wild.name)
            np.savez(root / f"{wild.name}.npz", **inputs_of(wild))  # type: ignore[arg-type]
            drafts.append(asyncio.create_task(one(wild.name, root / f"{wild.name}.npz", lab)))
        (root / MIXTURE).mkdir()
        await asyncio.to_thread(write_mixture, root / MIXTURE)
        await asyncio.gather(*drafts, one(MIXTURE, None, lab))


def inputs_of(wild: Wild, seed: int = 1) -> Arrays:
    return wild.inputs(np.random.default_rng(seed))


def alone(folder: Path, part: Expert, inputs: Arrays) -> Arrays:
    """What onnxruntime gives in this process, with the options of an agent's session."""
    data = (folder / part.file).read_bytes()
    session = onnxruntime.InferenceSession(data, sessions.session_options(), providers=sessions.PROVIDERS)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {spec.name: inputs[spec.name] for spec in part.inputs}), strict=True))


def assert_same(answer: Arrays, expected: Arrays) -> None:
    assert list(answer) == list(expected)
    for name, array in expected.items():
        assert (answer[name].dtype, answer[name].shape) == (array.dtype, array.shape), name
        assert answer[name].tobytes() == array.tobytes(), name


async def test_each_gives_bit_for_bit_what_onnxruntime_gives_alone(published: tuple[LocalFleet, Path]) -> None:
    fleet, root = published
    assert len({wild.exporter for wild in WILD}) == len(WILD) >= 6
    opsets = {wild.opset for wild in WILD}
    assert min(opsets) <= 9 and max(opsets) == 21
    client, sizes = fleet.client(), []
    for wild in WILD:
        model = load_model(root / wild.name)
        (expert,) = model.experts
        assert (expert.opset, expert.batch, model.gate) == (wild.opset, wild.batch, None)
        sizes.append(expert.bytes)
        for seed in (1, 2):
            inputs = inputs_of(wild, seed)
            answer = await asyncio.to_thread(client.infer, wild.name, inputs)
            assert_same(answer.outputs, alone(root / wild.name, expert, inputs))
            assert answer.assurance == "verified" and len(answer.verdicts) == 1
    assert max(sizes) > 20_000_000


async def test_a_gate_of_the_wild_weighs_experts_of_the_wild(published: tuple[LocalFleet, Path]) -> None:
    """Its gate says a label as well as probabilities; the answer is the weighted sum, in float64, of two of three."""
    fleet, root = published
    model = load_model(root / MIXTURE)
    x = np.random.default_rng(9).standard_normal((6, 4)).astype(np.float32)
    answer = await asyncio.to_thread(fleet.client().infer, MIXTURE, {"X": x}, wait="final")
    assert model.gate is not None and len(model.gate.outputs) == 2
    scores = alone(root / MIXTURE, model.gate, {"X": x})["probabilities"]
    experts, weights = choose(scores, model.top_k)
    expected = np.zeros((6, 1))
    for row in range(6):
        for index, weight in zip(experts[row], weights[row], strict=True):
            value = alone(root / MIXTURE, model.experts[index], {"X": x[row : row + 1]})["variable"]
            expected[row] += np.float64(weight) * value[0]
    assert np.abs(answer.outputs["variable"] - expected).max() < 1e-6
    _audited(fleet, answer.request, model, answer.outputs)


async def test_an_answer_without_gate_is_audited_offline_whatever_its_shape(
    published: tuple[LocalFleet, Path],
) -> None:
    """Two sizes of an image are open, so its output's bytes do not tell its shape; the receipt does."""
    fleet, root = published
    wild = next(wild for wild in WILD if wild.name == "ocr-lines")
    model, client = load_model(root / wild.name), fleet.client()
    assert model.experts[0].outputs[0].dims == (None, 1, None, None)
    for height, width in ((32, 96), (96, 32)):
        x = np.random.default_rng(3).standard_normal((1, 3, height, width)).astype(np.float32)
        answer = await asyncio.to_thread(client.infer, wild.name, {"x": x}, wait="final")
        assert answer.outputs["sigmoid_0.tmp_0"].shape == (1, 1, height, width)
        _audited(fleet, answer.request, model, answer.outputs)


def _audited(fleet: LocalFleet, request: str, model: Model, outputs: Arrays) -> None:
    receipt = Client(fleet.url).receipt(request)
    audited = verify_receipt(receipt, StateLayout(fleet.state).load_trust())
    assert audited.result is not None and audited.kind == "answer"
    assert {(t.name, t.dims, t.data) for t in audited.result} == {
        (name, array.shape, array.tobytes()) for name, array in outputs.items()
    }


async def test_the_command_publishes_a_new_version_to_a_running_gateway(published: tuple[LocalFleet, Path]) -> None:
    """`bmoe model publish --bump`: the next version is served without a restart, and an older one takes no place."""
    fleet, root = published
    folder = root / MIXTURE
    text = original = (folder / MANIFEST_NAME).read_text()
    for blank in ("licence", "description"):
        text = text.replace(f'"{blank}": "FILL IN', f'"{blank}": "filled in')
    (folder / MANIFEST_NAME).write_text(text.replace('"top_k": 2', '"top_k": 3'))
    with pytest.raises(RefusedError, match="mixture 1 is published with other content: give it version 2"):
        await asyncio.to_thread(publish, fleet.state, folder, "operator")
    status, said = await _bmoe("model", "publish", str(folder), "--bump", "--state", str(fleet.state))
    assert status == 0 and "published mixture version 2; it is served now" in said
    answer = await asyncio.to_thread(fleet.client().infer, MIXTURE, {"X": np.zeros((1, 4), np.float32)})
    assert len(answer.verdicts) == 3
    (status, said), (_, listed) = await asyncio.gather(
        _bmoe("model", "publish", str(folder), "--bump", "--state", str(fleet.state)),
        _bmoe("model", "list", "--state", str(fleet.state)),
    )
    assert status == 0 and "mixture version 2 is published already; nothing changed" in said
    assert listed.count("mixture version 2, 3 experts") == 1
    (folder / MANIFEST_NAME).write_text(original)
    assert (await asyncio.to_thread(publish, fleet.state, folder, "operator"))["position"] == 0


async def test_a_model_of_ones_own_with_large_outputs_is_served_verified_and_audited(
    published: tuple[LocalFleet, Path],
) -> None:
    """They are larger than what rides in a frame, so they go through the evidence store, and validators fetch them."""
    fleet, _ = published
    client = fleet.client()
    x = np.random.default_rng(5).normal(size=(ROWS, COLUMNS)).astype(np.float32)
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


async def _bmoe(*arguments: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from coordinator.cli import main; sys.exit(main())", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await child.communicate()
    return child.returncode or 0, " ".join(said.decode().split())
