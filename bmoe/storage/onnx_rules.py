"""Whether an ONNX file can be served, judged from the file alone, with the reason and what to do where it cannot.

What an agent, a referee and a validator compute must be the same bytes or nearly so, from one file of known digest, so:
no draws, no weights elsewhere, no operators that only the owner's machine has, tensors in and out. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bmoe.protocol.errors import ModelError
from bmoe.storage.manifest import DTYPES, MAX_RANK, Expert, TensorSpec
from bmoe.storage.onnx_file import OnnxFile, Operator, Value

# Boards run onnxruntime >= 1.20.1, which takes these; before 7, operators meant other things (broadcasting).
OPSETS = {"": (7, 21), "ai.onnx.ml": (1, 5), "com.microsoft": (1, 1)}
INT8 = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
IR_VERSION_MAX = 10  # of onnxruntime 1.20
# Operators of integer products, and at which input their weights stand.
_WEIGHTS_AT = {
    "MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "QAttention": 1,
    "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1,
}  # fmt: skip
# What weights may pass through on their way there.
_PASSES = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}
_DRAWS = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
    "Sampling", "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout",
}  # fmt: skip
_SAVE_AS_ONE = "save it as one file: onnx.save(onnx.load(FILE), FILE), or let `bmoe model init` do it"
_HINTS = {
    "sequence": "export classifiers of scikit-learn with options={'zipmap': False}",
    "map": "export classifiers of scikit-learn with options={'zipmap': False}",
    "optional": "export it without optional values",
    "sparse tensor": "put a conversion to a dense tensor behind it",
}
_DTYPE_HINTS = {
    "string": "encode text to numbers before the model, decode behind it",
    "bfloat16": "put Casts to and from float32 around the model",
}


def check_servable(found: OnnxFile) -> None:
    """Raise ModelError with the first reason why this file cannot be served."""
    for reason in reasons_against(found):
        raise ModelError(reason)


def reasons_against(found: OnnxFile) -> Iterator[str]:
    """Every reason why this file cannot be served, each one line."""
    yield from _opsets(found)
    yield from _foreign(found)
    yield from _saturates(found)
    yield from _draws(found)
    for location in found.external[:1]:
        if leaves_folder(location):
            yield f"its weights are said to lie at {location!r}, outside its folder: {_SAVE_AS_ONE}"
        else:
            yield f"its weights lie in another file, {location!r}; an expert is one file: {_SAVE_AS_ONE}"
    for side, values in (("input", found.inputs), ("output", found.outputs)):
        if not values:
            yield f"it has no {side}s"
        for value in values:
            yield from _unlike_tensor(side, value)


def check_declared(found: OnnxFile, expert: Expert) -> None:
    """Raise ModelError unless the manifest says of the file what the file says of itself."""
    if expert.opset != opset_of(found):
        raise ModelError(f"the manifest says opset {expert.opset}, the file {opset_of(found)}")
    _same_values("input", found.inputs, expert.inputs)
    _same_values("output", found.outputs, expert.outputs)


def opset_of(found: OnnxFile) -> int:
    """The version of the standard operators; of another domain's where it uses none of them."""
    return found.opsets.get("") or max(found.opsets.values(), default=0)


def leaves_folder(location: str) -> bool:
    """Whether a location of external data, which is relative to the model's file, may lie outside its folder."""
    parts = location.replace("\\", "/").split("/")
    return location.startswith(("/", "\\")) or ".." in parts or ":" in location or "\0" in location


def is_quantised(found: OnnxFile) -> bool:
    """Whether it computes with 8-bit integers."""
    return any(operator.name in INT8 for operator in found.operators)


def _opsets(found: OnnxFile) -> Iterator[str]:
    if not found.opsets:
        yield "it imports no operators: not an ONNX model"
    if found.ir_version > IR_VERSION_MAX:
        yield f"IR version {found.ir_version}: boards read at most {IR_VERSION_MAX}; set ir_version to it and save again"
    for domain, version in sorted(found.opsets.items()):
        low, high = OPSETS.get(domain, (0, 1 << 63))
        if not low <= version <= high:
            yield (
                f"opset {version} of {domain or 'ai.onnx'}: boards take {low}..{high}; export it with such a target opset"
            )


def _saturates(found: OnnxFile) -> Iterator[str]:
    """int8 weights that onnxruntime's exact mode on x86 (session.x64quantprecision) does not reach.

    It rewrites constants of the operator's own graph alone; weights made while running, or held by an outer graph,
    saturate all the same on processors without VNNI (measured on AVX2).
    """
    makers = {(o.where, name): o for o in found.operators if o.name in (*_PASSES, "DynamicQuantizeLinear", "Constant")
              for name in o.outputs}  # fmt: skip
    for operator in found.operators:
        place = _WEIGHTS_AT.get(operator.name, len(operator.inputs))
        if place >= len(operator.inputs):
            continue
        where, name = operator.where, operator.inputs[place]
        maker = makers.get((where, name))
        for _ in found.operators:  # at most as many steps as there are operators
            if (where, name) in found.weights or maker is None or maker.name not in _PASSES:
                break
            name = maker.inputs[0] if maker.inputs else ""
            maker = makers.get((where, name))
        # What DynamicQuantizeLinear gives is uint8, which does not saturate.
        if (where, name) in found.weights or maker is not None or found.constant_dtypes.get(name, "int8") != "int8":
            continue
        yield (
            f"operator {operator.name!r}{_where(operator)} multiplies by int8 weights {name!r} that are no constant of"
            " its own graph: on x86 they saturate and differ from ARM; put them there, or quantise to uint8 with"
            " reduce_range=True"
        )
        return


def _foreign(found: OnnxFile) -> Iterator[str]:
    """Operators of domains that onnxruntime does not bring along; those that the file defines itself are its own."""
    for operator in found.operators:
        if operator.name == "EPContext":
            yield (
                f"operator {operator.name!r}{_where(operator)} holds, or names a file of, code compiled for one accelerator,"
                " which nobody else can check; export the model itself"
            )
            return
        if operator.domain not in OPSETS and (operator.domain, operator.name) not in found.functions:
            yield (
                f"operator {operator.name!r}{_where(operator)} is of the domain {operator.domain!r}, which needs a library"
                " that boards do not load; express it in standard operators"
            )
            return


def _draws(found: OnnxFile) -> Iterator[str]:
    known_false = found.false - found.constants
    for operator in found.operators:
        if operator.name in _DRAWS and (operator.domain, operator.name) not in found.functions:
            yield (
                f"operator {operator.name!r}{_where(operator)} draws random numbers, so no two boards would agree;"
                " make the draw an input of the model"
            )
            return
        training = operator.inputs[2] if len(operator.inputs) > 2 else ""
        if operator.name == "Dropout" and training and training not in known_false:
            yield f"Dropout{_where(operator)} is, or can be, in training mode; export the model in eval mode"
            return


def _unlike_tensor(side: str, value: Value) -> Iterator[str]:
    if value.kind != "tensor":
        hint = _HINTS.get(value.kind, "give it the type of a tensor")
        yield f"{side} {value.name!r} is a {value.kind}, only tensors can be sent, signed and compared; {hint}"
    elif value.dtype not in DTYPES:
        hint = _DTYPE_HINTS.get(value.dtype, "put Casts around the model")
        yield f"{side} {value.name!r} is of {value.dtype or 'no dtype'}, expected one of {', '.join(DTYPES)}; {hint}"
    elif value.dims is not None and len(value.dims) > MAX_RANK:
        yield f"{side} {value.name!r} has {len(value.dims)} dims, at most {MAX_RANK} do"


def _same_values(side: str, values: Sequence[Value], specs: Sequence[TensorSpec]) -> None:
    names, declared = [v.name for v in values], [s.name for s in specs]
    if names != declared:
        raise ModelError(f"the manifest declares the {side}s {declared}, the file has {names}, in this order")
    for value, spec in zip(values, specs, strict=True):
        if value.dtype != spec.dtype or not _fits(value, spec):
            dims = "[unknown rank]" if value.dims is None else list(value.dims)
            raise ModelError(
                f"the manifest declares {side} {spec.name!r} as {spec.dtype}{list(spec.dims)}, the file says"
                f" {value.dtype}{dims}"
            )


def _fits(value: Value, spec: TensorSpec) -> bool:
    """A manifest may be narrower where the file leaves a size open, never wider, never other."""
    if value.dims is None:
        return True
    return len(value.dims) == len(spec.dims) and all(
        declared == size or not isinstance(size, int) for size, declared in zip(value.dims, spec.dims, strict=True)
    )


def _where(operator: Operator) -> str:
    return f" (in {operator.where})" if operator.where else ""
