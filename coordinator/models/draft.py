"""`bmoe model init`: a manifest from the ONNX files of a folder, with everything that can be read or measured.

What only the owner knows stands in it as a placeholder, which `check` refuses. What was assumed is said.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import BmoeError, InferenceError, InputError, ManifestError, ModelError
from bmoe.protocol.files import write_durably
from bmoe.storage.golden import write_golden
from bmoe.storage.manifest import (
    FLOAT_DTYPES,
    FORMAT,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    Expert,
    Golden,
    Model,
    TensorSpec,
    parse_manifest,
    render_manifest,
)
from bmoe.storage.onnx_file import OnnxFile, Value, read_onnx_file
from bmoe.storage.onnx_inline import INLINED, inlined
from bmoe.storage.onnx_rules import check_servable, opset_of
from coordinator.models import sample, tolerance, trial
from coordinator.models.trial import Arrays, Lab

PLACEHOLDER = "FILL IN"
GATE_FILE = "gate.onnx"
BATCH_ROWS = 64
# Rows that share a run differ from rows alone by rounding; what differs by more depends on its neighbours.
ALONE_OR_TOGETHER = 1e-3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What an owner says beforehand. `inputs`: an .npz of real ones; `shapes` for sizes that the files leave open."""

    name: str = ""
    gate: str = ""
    top_k: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Path | None = None


@dataclass(frozen=True)
class Part:
    """One ONNX file on its way into the manifest."""

    name: str
    path: Path
    found: OnnxFile
    file: ExpertFile


async def draft(folder: Path, wishes: Wishes, say: Say, lab: Lab) -> Model:
    """Write `model.json` and the golden pairs into `folder`. Raises BmoeError for what cannot be served or measured."""
    known = _known(folder)
    gate_path, expert_paths = model_files(folder, wishes.gate)
    gate = _part("gate", gate_path) if gate_path else None
    names = _names(expert_paths)
    experts = [_part(name, path) for name, path in zip(names, expert_paths, strict=True)]
    parts = [*experts, *([gate] if gate else [])]
    inputs, batch = await _sample(lab.by(), parts, wishes, say)
    made = [await _measured(lab, part, _of(part, inputs), batch, say) for part in parts]
    model = _whole(folder, wishes, known, made[: len(experts)], made[-1] if gate else None, say)
    data = render_manifest(model)
    parse_manifest(data)
    write_durably(folder / MANIFEST_NAME, data)
    return model


def model_files(folder: Path, gate: str) -> tuple[Path | None, list[Path]]:
    """The gate's file, if there is one, and the experts' in their natural order, weights of other files taken in."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    gate_path = folder / (gate or GATE_FILE)
    if gate and not gate_path.is_file():
        raise InputError(f"--gate {gate}: no such file in {folder}")
    paths = sorted((p for p in folder.glob("*.onnx") if not p.name.endswith(INLINED)), key=_natural)
    experts = [_single(path) for path in paths if path != gate_path]
    if not experts:
        raise InputError(f"{folder} holds no .onnx file{' but the gate' if paths else ''}")
    has_gate = gate_path.is_file()
    if len(experts) > 1 and not has_gate:
        raise InputError(f"{len(experts)} experts need a gate: call its file {GATE_FILE}, or name it with --gate")
    return _single(gate_path) if has_gate else None, experts


def _single(path: Path) -> Path:
    """The file itself, or beside it one that holds the weights it keeps in other files of its folder."""
    if not read_onnx_file(path).external:
        return path
    target = path.with_name(path.stem + INLINED)
    write_durably(target, inlined(path))
    return target


def _part(name: str, path: Path) -> Part:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelError(f"{path.name} has {size} bytes, a single ONNX file at most {MAX_FILE_BYTES}")
    found = read_onnx_file(path)
    try:
        check_servable(found)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return Part(name, path, found, ExpertFile(digest, path))


def _of(part: Part, inputs: Arrays) -> Arrays:
    missing = [value.name for value in part.found.inputs if value.name not in inputs]
    if missing:
        raise InputError(f"{part.path.name} takes {missing}, which the first expert does not: all must take the same")
    return {value.name: inputs[value.name] for value in part.found.inputs}


async def _sample(runner: Runner, parts: list[Part], wishes: Wishes, say: Say) -> tuple[Arrays, bool]:
    """Inputs that every part takes, and whether rows of axis 0 are independent."""
    values = parts[0].found.inputs
    reason = next((r for part in parts if (r := _never_batch(part.found))), "")
    if wishes.inputs is not None:
        inputs = sample.given(wishes.inputs, values)
        say(f"inputs: those of {wishes.inputs}")
    else:
        rows = None if reason else sample.ROWS
        inputs = await _first_taken(runner, parts, wishes, rows)
        shapes = ", ".join(f"{n} {a.dtype.name}{list(a.shape)}" for n, a in inputs.items())
        say(
            f"inputs: drawn with seed {sample.SEED}, floats normal, integers 0 or 1: {shapes}; --inputs gives real ones"
        )
    if not reason:
        reason = await _depends(runner, parts, inputs)
    if reason:
        say(f"batch: false, {reason}; one request is one run")
        if wishes.inputs is None:
            inputs = await _first_taken(runner, parts, wishes, None)
    else:
        say("batch: true, axis 0 of every tensor is open, and rows gave the same alone and together")
    return inputs, not reason


async def _first_taken(runner: Runner, parts: list[Part], wishes: Wishes, rows: int | None) -> Arrays:
    error: BmoeError | None = None
    for counts in dict.fromkeys((rows, None)):
        for inputs in sample.candidates(parts[0].found.inputs, wishes.shapes, counts):
            try:
                for part in parts:
                    await trial.run(runner, part.file, _of(part, inputs))
                return inputs
            except (InferenceError, InputError, ModelError) as failed:
                if isinstance(failed, ModelError):
                    raise
                error = error or failed
    raise InferenceError(f"no drawn input was taken; give real ones (--inputs FILE.npz) or sizes (--shape): {error}")


def _never_batch(found: OnnxFile) -> str:
    """Why rows of axis 0 cannot be told apart by what the file declares, or "" where they may be."""
    for side, values in (("input", found.inputs), ("output", found.outputs)):
        for value in values:
            if value.dims is not None and (not value.dims or isinstance(value.dims[0], int)):
                return f"{side} {value.name!r} is {list(value.dims)}, without an open axis 0"
    return ""


async def _depends(runner: Runner, parts: list[Part], inputs: Arrays) -> str:
    """How rows depend on each other, or "" where they do not."""
    sizes = {name: array.shape[:1] for name, array in inputs.items()}
    rows = next(iter(sizes.values()))
    if set(sizes.values()) != {rows} or rows < (2,):
        return f"the inputs have {[list(a.shape) for a in inputs.values()]}, not one number of rows above 1"
    for part in parts:
        try:
            together = await trial.run(runner, part.file, _of(part, inputs))
            alone = await trial.run_rows(runner, part.file, _of(part, inputs))
        except BmoeError as error:
            return f"{part.path.name} does not take single rows ({error})"
        for name, gap in trial.greatest_difference(together, alone).items():
            if together[name].shape[:1] != rows or gap > ALONE_OR_TOGETHER * tolerance.scale(together[name]):
                return f"output {name!r} of {part.path.name} is another for a row alone than among others"
    return ""


async def _measured(lab: Lab, part: Part, inputs: Arrays, batch: bool, say: Say) -> Expert:
    outputs = await trial.run(lab.by(), part.file, inputs)
    if infinite := trial.not_finite(outputs):
        raise ModelError(
            f"{part.path.name}: output {infinite[0]!r} is not finite for this input; no vote can be on that"
        )
    drift = await tolerance.drift(lab, part.file, inputs, outputs, batch)
    epsilons = tolerance.epsilons(part.found, outputs, drift)
    needed = await trial.memory_mb(part.file, trial.rows_of(inputs, BATCH_ROWS) if batch else inputs)
    for name, epsilon in epsilons.items():
        say(f"{part.path.name}: {tolerance.explained(part.found, name, outputs[name], drift[name], epsilon)}")
    golden = part.path.with_name(f"golden-{part.name}.npz")
    data = write_golden(inputs, outputs)
    write_durably(golden, data)
    batched = replace_first if batch else _as_given
    return Expert(
        name=part.name,
        file=part.path.name,
        sha256=part.file.digest.hex(),
        bytes=part.path.stat().st_size,
        opset=opset_of(part.found),
        memory_mb=needed,
        batch=batch,
        inputs=tuple(TensorSpec(v.name, v.dtype, batched(_dims(v, inputs[v.name].ndim))) for v in part.found.inputs),
        outputs=tuple(
            TensorSpec(v.name, v.dtype, batched(_dims(v, outputs[v.name].ndim)), epsilons[v.name])
            for v in part.found.outputs
        ),
        golden=Golden(golden.name, hashlib.sha256(data).hexdigest(), len(data)),
    )


def _dims(value: Value, rank: int) -> tuple[int | None, ...]:
    if value.dims is None:
        return (None,) * rank
    return tuple(d if isinstance(d, int) and d > 0 else None for d in value.dims)


def replace_first(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The dims of a batch: axis 0 counts rows."""
    return (None, *dims[1:])


def _as_given(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return dims


def _whole(
    folder: Path, wishes: Wishes, known: Model | None, experts: list[Expert], gate: Expert | None, say: Say
) -> Model:
    top_k = wishes.top_k or (known.top_k if known else 0) or _top_k(experts, gate)
    model = Model(
        format=FORMAT,
        name=wishes.name or (known.name if known else _plain(folder.resolve().name)),
        version=1,
        licence=known.licence if known else f"{PLACEHOLDER}: an SPDX identifier, such as Apache-2.0",
        description=known.description if known else f"{PLACEHOLDER}: what goes in, what comes out, for whom.",
        top_k=min(top_k, len(experts)),
        combine="weighted_sum",
        labels=known.labels if known else (),
        gate=gate,
        experts=tuple(experts),
        cacheable=known is not None and known.cacheable,
    )
    if known is not None:
        same = replace(model, version=known.version) == known
        model = replace(model, version=known.version + (not same))
        say("licence, description, labels, top_k and cacheable: kept from the model.json that was there")
    elif gate:
        say(f"top_k: {model.top_k} of {len(experts)} experts, assumed; --top-k says another")
    return model


def _top_k(experts: list[Expert], gate: Expert | None) -> int:
    floats = all(spec.dtype in FLOAT_DTYPES for spec in experts[0].outputs)
    return 2 if gate and floats else 1


def _known(folder: Path) -> Model | None:
    """The manifest that is there already, for what its owner wrote into it."""
    try:
        return parse_manifest((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ManifestError):
        return None


def _names(paths: list[Path]) -> list[str]:
    names: list[str] = []
    for path in paths:
        name = _plain(path.stem.removesuffix(INLINED.removesuffix(".onnx")))
        name = f"{name[:28]}-{len(names)}" if name in (*names, "gate") else name
        names.append(name)
    return names


def _plain(text: str) -> str:
    """A name as manifests spell them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].strip("-") or "model"


def _natural(path: Path) -> list[tuple[int, str]]:
    """expert-2 before expert-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
