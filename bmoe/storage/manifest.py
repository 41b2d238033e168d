"""The model manifest `model.json`: what a model is made of, and the strict reading of it.

A manifest names every file of a model with its size and SHA-256, and says what the coordinator and the agents must
know without opening the file: tensors, tolerance (epsilon), memory, opset, golden pair. JSON, UTF-8, at most 1 MiB.
Unknown keys are refused, so a field that a later format adds is never half understood. Standard library only.

The gate: its inputs are some or all of the experts' inputs; its one float output scores the experts of each row, never
below 0 (a softmax). The `top_k` highest scores are activated (ties: the lower index) and renormalised to sum 1;
`weighted_sum` adds weight * output in float64, and with `top_k` 1 takes the one output as it is, whatever its dtype.
Without a gate there is one expert, and its output is the answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ManifestError
from bmoe.storage.strict_json import Read, integer, list_of, object_of, one_of, or_null, parse_json, text, wrong

FORMAT = 1
MANIFEST_NAME = "model.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_EXPERTS = 256
MAX_TENSORS = 16
MAX_RANK = 8
MAX_LABELS = 4096
MAX_FILE_BYTES = 2**31 - 1  # a protobuf message, hence an ONNX file, cannot be longer
COMBINES = ("weighted_sum",)
FLOAT_DTYPES = ("float32", "float64", "float16")
DTYPES = (*FLOAT_DTYPES, "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_TENSOR_NAME = re.compile(r"[!-~]{1,128}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LICENCE = re.compile(r"[ -~]{1,128}")
# No control characters and no lone surrogates: these texts are shown to people and re-encoded as UTF-8.
_LABEL = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}")
_DESCRIPTION = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]{0,4096}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dims`: None is dynamic. `epsilon`: absolute tolerance of an output; 0 for inputs and
    integers, above 0 for floats."""

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    epsilon: float = 0.0


@dataclass(frozen=True)
class Golden:
    """A known input and output of an expert: one .npz whose arrays are named `in.<tensor>` and `out.<tensor>`."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Expert:
    """One ONNX file, an expert or the gate. `batch`: axis 0 of every input and output counts independent rows, so that
    requests may share a run; without it one request is one run."""

    name: str
    file: str
    sha256: str
    bytes: int
    opset: int
    memory_mb: int
    batch: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    licence: str | None = None
    golden: Golden | None = None


@dataclass(frozen=True)
class Model:
    """A gate and its experts; a model of one expert needs no gate. `cacheable`: equal inputs may be answered from a
    verdict that was made before."""

    format: int
    name: str
    version: int
    licence: str
    description: str
    top_k: int
    combine: str
    labels: tuple[str, ...]
    gate: Expert | None
    experts: tuple[Expert, ...]
    cacheable: bool = False


Part = Expert | Golden


def parse_manifest(data: bytes) -> Model:
    """The model that `data` describes. Raises ManifestError naming the JSON path, what was expected and what came."""
    model = _model(parse_json(data, MAX_MANIFEST_BYTES), "$")
    _check_whole(model)
    return model


def render_manifest(model: Model) -> bytes:
    """The one spelling this project writes; `parse_manifest(render_manifest(m)) == m`."""
    tree = asdict(model)
    for expert in [*tree["experts"], *([tree["gate"]] if tree["gate"] else [])]:
        for spec in expert["inputs"]:
            del spec["epsilon"]
        for optional in ("licence", "golden"):
            if expert[optional] is None:
                del expert[optional]
    if not model.cacheable:
        del tree["cacheable"]
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest_digest(data: bytes) -> bytes:
    """SHA-256 (32 bytes) of the manifest's bytes as they lie on disk: the identity of a model version."""
    return hashlib.sha256(data).digest()


def read_part(folder: Path, part: Part) -> bytes:
    """The bytes of an expert's or golden file, after size and SHA-256 agree: use these bytes, do not open it again.

    Raises ManifestError if the file is missing, not a plain file, or not the one the manifest names.
    """
    path = folder / part.file
    try:
        if not path.is_file():
            raise ManifestError(f"{path}: expected a file of {part.bytes} bytes, found none")
        with path.open("rb") as stream:
            data = stream.read(part.bytes + 1)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) != part.bytes:
        found = "more" if len(data) > part.bytes else str(len(data))
        raise ManifestError(f"{path}: expected {part.bytes} bytes, found {found}; fetch the model again")
    digest = hashlib.sha256(data).hexdigest()
    if digest != part.sha256:
        raise ManifestError(f"{path}: expected SHA-256 {part.sha256}, found {digest}; fetch the model again")
    return data


def parts(model: Model) -> list[Part]:
    """Every file the manifest names: gate first, then experts, each followed by its golden pair."""
    experts = [model.gate, *model.experts] if model.gate else list(model.experts)
    return [part for expert in experts for part in (expert, expert.golden) if part is not None]


def load_model(folder: Path) -> Model:
    """The model in `folder`, all of whose files have been read and found true. Raises ManifestError."""
    path = Path(folder) / MANIFEST_NAME
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: expected a model manifest: {error.strerror}") from None
    model = parse_manifest(data)
    for part in parts(model):
        read_part(Path(folder), part)
    return model


def _epsilon(value: Any, path: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise wrong(path, "a finite number >= 0", value)
    return float(value)


_file: dict[str, Read] = {
    "file": text(_FILE_NAME, "a plain file name of letters, digits, '.', '_', '-'"),
    "sha256": text(_SHA256, "64 lower-case hexadecimal digits"),
    "bytes": integer(1, MAX_FILE_BYTES),
}
_input: dict[str, Read] = {
    "name": text(_TENSOR_NAME, "1..128 printable ASCII characters without spaces"),
    "dtype": one_of(*DTYPES),
    "dims": list_of(or_null(integer(1, 2**31 - 1)), 0, MAX_RANK),
}
_name = text(_NAME, "1..32 of a-z, 0-9, '-', no '-' at either end")
_licence = text(_LICENCE, "1..128 printable ASCII characters")
_expert = object_of(
    Expert,
    {
        "name": _name,
        **_file,
        "opset": integer(1, 999),
        "memory_mb": integer(1, 1 << 20),
        "batch": one_of(True, False),
        "inputs": list_of(object_of(TensorSpec, _input), 1, MAX_TENSORS),
        "outputs": list_of(object_of(TensorSpec, {**_input, "epsilon": _epsilon}), 1, MAX_TENSORS),
        "licence": _licence,
        "golden": object_of(Golden, _file),
    },
    optional=("licence", "golden"),
)
_model = object_of(
    Model,
    {
        "format": one_of(FORMAT),
        "name": _name,
        "version": integer(1, 2**31 - 1),
        "licence": _licence,
        "description": text(_DESCRIPTION, "0..4096 characters, no control characters"),
        "top_k": integer(1, MAX_EXPERTS),
        "combine": one_of(*COMBINES),
        "labels": list_of(text(_LABEL, "1..64 characters, no control characters"), 0, MAX_LABELS),
        "gate": or_null(_expert),
        "experts": list_of(_expert, 1, MAX_EXPERTS),
        "cacheable": one_of(True, False),
    },
    optional=("cacheable",),
)


def _check_whole(model: Model) -> None:
    """What no single field can show: names, files, and that gate and experts fit together."""
    named = [(f"$.experts[{index}]", expert) for index, expert in enumerate(model.experts)]
    if model.gate:
        named.append(("$.gate", model.gate))
    _check_unique("$.experts", "names", [expert.name for _, expert in named])
    _check_unique("$.experts", "file names", [MANIFEST_NAME, *(part.file for part in parts(model))])
    _check_unique("$.labels", "labels", model.labels)
    if model.top_k > len(model.experts):
        raise wrong("$.top_k", f"at most the {len(model.experts)} experts there are", model.top_k)
    for path, expert in named:
        _check_tensors(path, expert)
        if expert.batch != model.experts[0].batch:
            raise wrong(f"{path}.batch", f"that of $.experts[0], {model.experts[0].batch}", expert.batch)
        if expert is not model.gate:
            _check_same(f"{path}.inputs", model.experts[0].inputs, expert.inputs)
            _check_same(f"{path}.outputs", model.experts[0].outputs, expert.outputs)
    if model.labels and not any(spec.dims[-1:] == (len(model.labels),) for spec in model.experts[0].outputs):
        raise wrong("$.labels", "as many labels as an output's last dim", f"{len(model.labels)} labels")
    _check_gate(model)


def _check_tensors(path: str, expert: Expert) -> None:
    for kind, specs in (("inputs", expert.inputs), ("outputs", expert.outputs)):
        _check_unique(f"{path}.{kind}", "names", [spec.name for spec in specs])
        for index, spec in enumerate(specs):
            if expert.batch and spec.dims[:1] != (None,):
                raise wrong(f"{path}.{kind}[{index}].dims", "null first, for batch is true", list(spec.dims))
    for index, spec in enumerate(expert.outputs):
        if (spec.epsilon > 0) != (spec.dtype in FLOAT_DTYPES):
            wanted = "above 0" if spec.dtype in FLOAT_DTYPES else "0"
            raise wrong(f"{path}.outputs[{index}].epsilon", f"{wanted} for {spec.dtype}", spec.epsilon)


def _check_gate(model: Model) -> None:
    count, gate = len(model.experts), model.gate
    if gate is None:
        if count != 1:
            raise wrong("$.gate", f"a gate for {count} experts", None)
        return
    known = {spec.name: spec for spec in model.experts[0].inputs}
    for index, spec in enumerate(gate.inputs):
        if known.get(spec.name) != spec:
            expected = f"an input that the experts have too: one of {_signature(model.experts[0].inputs)}"
            raise wrong(f"$.gate.inputs[{index}]", expected, _signature([spec])[0])
    floats = [spec for spec in gate.outputs if spec.dtype in FLOAT_DTYPES]
    if len(floats) != 1 or not _scores(floats[0].dims, gate.batch, count):
        rows = "[null, " if gate.batch else "[1, "
        raise wrong("$.gate.outputs", f"one float output, the scores {rows}{count}]", _signature(gate.outputs))
    for index, spec in enumerate(model.experts[0].outputs):
        # There is no sum of weighted labels: the one expert's output can be taken, several cannot be mixed.
        if model.top_k > 1 and spec.dtype not in FLOAT_DTYPES:
            raise wrong(
                f"$.experts[0].outputs[{index}].dtype", "a float, or top_k 1, for the gate's weights", spec.dtype
            )


def _scores(dims: tuple[int | None, ...], batch: bool, count: int) -> bool:
    """Whether these can be the dims of scores for `count` experts: of each row, or of the one row there is."""
    if dims[-1:] not in ((count,), (None,)):
        return False
    return (len(dims) == 2 and (batch or dims[0] in (1, None))) or (not batch and len(dims) == 1)


def _signature(specs: Sequence[TensorSpec]) -> list[tuple[str, str, tuple[int | None, ...]]]:
    return [(spec.name, spec.dtype, spec.dims) for spec in specs]


def _check_same(path: str, expected: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> None:
    if _signature(expected) != _signature(specs):
        raise wrong(path, f"those of $.experts[0], {_signature(expected)}", _signature(specs))


def _check_unique(path: str, what: str, values: Sequence[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise wrong(path, f"different {what}", f"{value} twice")
        seen.add(value)
