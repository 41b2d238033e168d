"""`bmoe model check`: whether a folder is a model that can be served as its manifest says. Every part is run.

For each file, in this order; the first that fails is the file's finding:
1 it is there, whole, of the digest and size stated    5 loads in a killable child within the memory stated
2 it is an ONNX file that can be served                6 the golden pair is of the declared shapes, and reproduced
3 the manifest declares what the file declares         7 a second run and a second process give the same bytes
4 it has a golden pair                                 8 rows alone and together agree; a gate's scores are weights
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.ledger.rules.outputs import check_specs
from bmoe.protocol.errors import BmoeError, ManifestError, MessageError, ModelError
from bmoe.storage.golden import read_golden
from bmoe.storage.manifest import (
    FLOAT_DTYPES,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Expert,
    Model,
    parse_manifest,
    read_part,
)
from bmoe.storage.onnx_file import OnnxFile, read_onnx
from bmoe.storage.onnx_rules import check_declared, check_servable, is_quantised
from coordinator.models import trial
from coordinator.models.draft import PLACEHOLDER
from coordinator.models.trial import Arrays, Lab


@dataclass(frozen=True)
class Finding:
    """What was found of one file, or of the manifest: one line, good or not."""

    subject: str
    good: bool
    text: str


def read_manifest(folder: Path) -> tuple[Model, bytes]:
    """The manifest of a folder and its bytes. Raises ManifestError."""
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; `bmoe model init {folder}` writes one") from None
    return parse_manifest(data), data


async def examine(folder: Path, lab: Lab) -> AsyncIterator[Finding]:
    """What is found of the manifest, then of each file."""
    try:
        model, _ = read_manifest(folder)
    except ManifestError as error:
        yield Finding(MANIFEST_NAME, False, str(error))
        return
    blanks = [name for name in ("licence", "description") if getattr(model, name).startswith(PLACEHOLDER)]
    if blanks:
        yield Finding(MANIFEST_NAME, False, f"{' and '.join(blanks)}: still to be filled in by the owner")
    else:
        yield Finding(MANIFEST_NAME, True, f"{model.name} version {model.version}, {len(model.experts)} experts")
    for part in [*model.experts, *([model.gate] if model.gate else [])]:
        try:
            yield Finding(part.file, True, await _examined(folder, part, part is model.gate, lab))
        except BmoeError as error:
            yield Finding(part.file, False, _short(error))


async def _examined(folder: Path, part: Expert, is_gate: bool, lab: Lab) -> str:
    data = read_part(folder, part)
    found = read_onnx(data)
    check_servable(found)
    check_declared(found, part)
    if part.golden is None:
        raise ManifestError(f"no golden pair: `bmoe model init {folder}` makes one")
    inputs, expected = read_golden(read_part(folder, part.golden))
    file = ExpertFile(bytes.fromhex(part.sha256), folder / part.file)
    _check_golden(part, inputs, expected)
    async with trial.confined(part.memory_mb) as runner:
        await runner.load(file)
        outputs = await trial.run(runner, file, inputs)
        again = await trial.run(runner, file, inputs)
    _check_shapes(part, inputs, outputs)
    await _check_reproduced(lab, part, found, file, inputs, expected, outputs)
    elsewhere = await trial.run(lab.by(), file, inputs)
    if not (trial.same_bytes(outputs, again) and trial.same_bytes(outputs, elsewhere)):
        raise ModelError("two runs on the same input gave different bytes: what boards compute could not be compared")
    if infinite := trial.not_finite(outputs):
        raise ModelError(f"output {infinite[0]!r} is not finite for the golden input; no vote can be on that")
    if part.batch:
        await _check_rows(part, lab.by(), file, inputs, outputs)
    if is_gate:
        _check_scores(part, outputs)
    worst = max(trial.greatest_difference(expected, outputs).values())
    note = await _int8_note(lab, found, file, inputs, outputs)
    return f"opset {part.opset}, {part.bytes} bytes, golden pair within {worst:.1e}, runs in {part.memory_mb} MB{note}"


def _check_golden(part: Expert, inputs: Arrays, expected: Arrays) -> None:
    for side, arrays, specs in (("in", inputs, part.inputs), ("out", expected, part.outputs)):
        wanted = [spec.name for spec in specs]
        if sorted(arrays) != sorted(wanted):
            raise ManifestError(f"the golden pair holds {side}puts {sorted(arrays)}, declared are {wanted}")
    _check_shapes(part, inputs, expected)


def _check_shapes(part: Expert, inputs: Arrays, outputs: Arrays) -> None:
    """Both sides as declared, with one number of rows where there is a batch axis."""
    rows = None
    if part.batch:
        first = inputs[part.inputs[0].name]
        rows = first.shape[0] if first.ndim else 0
    for arrays, specs in ((inputs, part.inputs), (outputs, part.outputs)):
        tensors = [trial.as_tensor(spec.name, arrays[spec.name]) for spec in specs]
        declared = [(s.name, s.dtype, tuple(d or 0 for d in s.dims)) for s in specs]
        try:
            check_specs(tensors, declared, rows)
        except MessageError as error:
            raise ModelError(f"what the golden pair shows is not what the manifest declares: {error}") from None


async def _check_reproduced(
    lab: Lab, part: Expert, found: OnnxFile, file: ExpertFile, inputs: Arrays, expected: Arrays, outputs: Arrays
) -> None:
    wrong = _beyond(part, expected, outputs)
    if not wrong:
        return
    if is_quantised(found) and not _beyond(part, expected, await trial.run(lab.by("saturating"), file, inputs)):
        raise ModelError(
            f"{wrong}: it was made by a session in which INT8 products saturate on x86, which no ARM board does;"
            " make it with session.x64quantprecision=1, or quantise with reduce_range=True"
        )
    raise ModelError(f"{wrong}; `bmoe model init` makes the pair anew, if the file is the right one")


def _beyond(part: Expert, expected: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> str:
    """Which output differs from the golden pair's by more than its tolerance, or ""."""
    gaps = trial.greatest_difference(expected, outputs)
    for spec in part.outputs:
        if gaps[spec.name] > spec.epsilon:
            return (
                f"the golden pair is not reproduced: output {spec.name!r} differs by {gaps[spec.name]:.3g}, allowed are"
                f" {spec.epsilon:g}"
            )
    return ""


async def _check_rows(part: Expert, runner: Runner, file: ExpertFile, inputs: Arrays, outputs: Arrays) -> None:
    """Requests may share a run only where a row's output does not depend on its neighbours."""
    gaps = trial.greatest_difference(outputs, await trial.run_rows(runner, file, inputs))
    for spec in part.outputs:
        if gaps[spec.name] > spec.epsilon:
            raise ModelError(
                f"output {spec.name!r} of a row alone differs by {gaps[spec.name]:.3g} from that among others, allowed are"
                f" {spec.epsilon:g}: say batch false, or a larger epsilon"
            )


def _check_scores(part: Expert, outputs: Arrays) -> None:
    scores = next(outputs[spec.name] for spec in part.outputs if spec.dtype in FLOAT_DTYPES)
    if (scores < 0).any():
        raise ModelError(
            f"the gate scores an expert {float(scores.min()):.3g}; weights are never below 0: put a Softmax behind it"
        )


async def _int8_note(lab: Lab, found: OnnxFile, file: ExpertFile, inputs: Arrays, outputs: Arrays) -> str:
    if not is_quantised(found):
        return ""
    gaps = trial.greatest_difference(outputs, await trial.run(lab.by("saturating"), file, inputs))
    if not any(gaps.values()):
        return ", INT8 exact"
    return (
        f", INT8 saturates by {max(gaps.values()):.1e} in other x86 sessions; agents, referee and validators avoid that"
    )


def _short(error: BmoeError) -> str:
    return " ".join(str(error).split())[:400]
