"""Experts as onnxruntime sessions: a model file opened, its inputs checked, run, its outputs as bytes. Worker side."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

# Before the import: some wheels of onnxruntime report home and leave a device id otherwise.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

from bmoe.inference import framing, providers
from bmoe.protocol.errors import InferenceError, InputError, MessageError, ModelError
from bmoe.protocol.tensors import MAX_DIMS, tensor_bytes

DTYPES = {
    "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip
LITTLE_ENDIAN = {name: np.dtype(name).newbyteorder("<") for name in DTYPES.values()}
PROVIDERS = [providers.CPU]
# Graph optimisations, threads, precise INT8. Tasks are run with the first; the last shows what INT8 loses without it.
VARIANTS = {
    "": ("ENABLE_ALL", 1, "1"),
    "extended": ("ENABLE_EXTENDED", 1, "1"),
    "basic": ("ENABLE_BASIC", 1, "1"),
    "plain": ("DISABLE_ALL", 1, "1"),
    "threads": ("ENABLE_ALL", 2, "1"),
    "saturating": ("ENABLE_ALL", 1, "0"),
}


class Slot(NamedTuple):
    """What an expert declares of one input or output; `dims` holds ints, or names and None where any size will do."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


class Expert(NamedTuple):
    """A loaded expert."""

    session: onnxruntime.InferenceSession
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


def read_model(path: str, digest: bytes, max_bytes: int) -> bytes:
    """The bytes of a regular file whose SHA-256 is `digest`. Raises ModelError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{path} is not a regular file")
            if status.st_size > max_bytes:
                raise ModelError(f"{path} has {status.st_size} bytes, the worker may use {max_bytes}")
            data = file.read(status.st_size)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    found = hashlib.sha256(data).digest()
    if found != digest:
        raise ModelError(f"{path} should have the SHA-256 {digest.hex()}, it has {found.hex()}")
    return data


def session_options(variant: str = "", threads: int = 1) -> onnxruntime.SessionOptions:
    """Options under which equal inputs give equal bytes, and memory goes back when a run is over.

    `variant`: one of VARIANTS, other honest ways to compute the same, from whose differences a tolerance is measured.
    """
    level, least, precise = VARIANTS[variant]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = max(least, threads)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # errors come as exceptions
    # Without it INT8 on x86 saturates and differs from ARM by up to 9 % of the range.
    options.add_session_config_entry("session.x64quantprecision", precise)
    # An expert is one file, the one whose digest was signed: look for others where none can be.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    return options


def open_expert(data: bytes, variant: str = "", threads: int = 1, wanted: Sequence[str] = PROVIDERS) -> Expert:
    """A session over the bytes of a model, on the first of the wanted providers that can be had.

    Raises ModelError, MemoryError.
    """
    names = providers.present(wanted, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(
            data, session_options(variant, threads), providers=providers.with_options(names)
        )
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise_if_memory(error)
        raise ModelError(f"onnxruntime cannot load it: {error}") from None
    return Expert(session, slots("input", session.get_inputs()), slots("output", session.get_outputs()))


def slots(side: str, declared: Sequence[onnxruntime.NodeArg]) -> tuple[Slot, ...]:
    """A session's inputs or outputs as what is checked at each call; raises ModelError for what cannot be carried."""
    for arg in declared:
        if arg.type not in DTYPES:
            raise ModelError(f"{side} {arg.name!r} is a {arg.type}, expected one of {', '.join(DTYPES)}")
        if len(arg.shape) > MAX_DIMS:
            raise ModelError(f"{side} {arg.name!r} has {len(arg.shape)} dims, expected at most {MAX_DIMS}")
    return tuple(Slot(arg.name, DTYPES[arg.type], tuple(arg.shape)) for arg in declared)


def feeds(expert: Expert, parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as arrays over the received bytes. Raises InputError naming what was expected and what came."""
    given: dict[str, np.ndarray] = {}
    declared = {slot.name: slot for slot in expert.inputs}
    for head, data in zip(parts[::2], parts[1::2], strict=True):
        name, dtype, dims = framing.parse_tensor_head(head.tobytes())
        if name not in declared or name in given:
            raise InputError(f"expected the inputs {sorted(declared)} once each, got {name!r}")
        slot = declared[name]
        if dtype != slot.dtype or not fits(slot.dims, dims):
            raise InputError(f"input {name!r}: expected {shown(slot.dtype, slot.dims)}, got {shown(dtype, dims)}")
        given[name] = data.view(LITTLE_ENDIAN[dtype]).reshape(dims)
    if len(given) < len(declared):
        raise InputError(f"expected the inputs {sorted(declared)}, got {sorted(given)}")
    return given


def fits(declared: Sequence[int | str | None], dims: Sequence[int]) -> bool:
    """Whether an array's dims are those declared, an int being fixed and a name or None open."""
    if not declared:  # a scalar or an unknown rank: onnxruntime shows both alike, and checks neither
        return True
    return len(declared) == len(dims) and all(
        want == got for want, got in zip(declared, dims, strict=True) if isinstance(want, int)
    )


def shown(dtype: str, dims: Sequence[int | str | None]) -> str:
    """A type and dims as errors spell them, such as float32[?, 6, 100]."""
    return f"{dtype}[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


def run_expert(expert: Expert, parts: Sequence[np.ndarray]) -> list[bytes]:
    """Duration, provider and outputs in the session's order, as the parts of a DONE frame.

    Raises InputError for what the expert cannot take, InferenceError where it fails on what it can, MemoryError.
    """
    inputs = feeds(expert, parts)
    started = time.perf_counter_ns()
    try:
        arrays = expert.session.run(None, inputs)
    except MemoryError:
        raise
    except Exception as error:
        raise_if_memory(error)
        raise InferenceError(f"the expert failed: {error}") from None
    duration_us = (time.perf_counter_ns() - started) // 1000
    reply = [framing.DURATION.pack(duration_us), expert.session.get_providers()[0].encode()]
    for slot, array in zip(expert.outputs, arrays, strict=True):
        reply += output_parts(slot, array)
    return reply


def output_parts(slot: Slot, array: np.ndarray) -> list[bytes]:
    """An output's header and bytes for the pipe; raises InferenceError for what the protocol cannot carry."""
    try:
        tensor_bytes(slot.dtype, array.shape)
    except MessageError as error:
        raise InferenceError(f"output {slot.name!r} cannot be carried: {error}") from None
    data = array.astype(LITTLE_ENDIAN[slot.dtype], copy=False).tobytes()
    return [framing.tensor_head(slot.name, slot.dtype, array.shape), data]


def raise_if_memory(error: Exception) -> None:
    """MemoryError where an error of onnxruntime, which has no class for it, means a failed allocation."""
    if any(sign in str(error) for sign in ("bad_alloc", "Failed to allocate memory")):
        raise MemoryError from None
