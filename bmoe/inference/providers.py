"""Execution providers: which of those wanted a session gets, and the options under which they compute like the CPU's.

Standard library only: the runner, which imports no onnxruntime, and the worker both use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

CPU = "CPUExecutionProvider"
# Each computes fp32 in fp32: TF32 and fp16 differ from other boards by far more than any tolerance.
OPTIONS: dict[str, dict[str, Any]] = {
    "TensorrtExecutionProvider": {"trt_fp16_enable": False, "trt_int8_enable": False, "trt_engine_cache_enable": False},
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
    "XnnpackExecutionProvider": {"intra_op_num_threads": "1"},
}
# TensorRT has no option of its own for it.
ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0"}
# These share the processor's memory and nothing else; a driver of a GPU maps far more than it uses.
BOUNDED = (CPU, "XnnpackExecutionProvider")


def present(wanted: Sequence[str], available: Iterable[str]) -> list[str]:
    """Those wanted that this onnxruntime has, in the order wanted, and the CPU's at the end."""
    known = set(available)
    return [name for name in dict.fromkeys(wanted) if name in known and name != CPU] + [CPU]


def with_options(names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """As a session takes them."""
    return [(name, OPTIONS.get(name, {})) for name in names]
