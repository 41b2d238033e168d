"""A model written in onnxscript, which reads this very source: tokens of any number, pooled under a mask."""
# ruff: noqa: F821
# mypy: ignore-errors

from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

own = Opset("tests.pooling", 1)


@script(own, default_opset=op)
def masked_mean(x, keep):
    """A function that the file defines in a domain of its own."""
    weights = op.Unsqueeze(op.Cast(keep, to=1), op.Constant(value_ints=[2]))
    total = op.ReduceSum(weights, op.Constant(value_ints=[1]), keepdims=0)
    return op.ReduceSum(x * weights, op.Constant(value_ints=[1]), keepdims=0) / op.Max(
        total, op.Constant(value_float=1.0)
    )


@script(default_opset=op)
def pooled(tokens: INT64["B", "T"], keep: BOOL["B", "T"]) -> FLOAT["B", 8]:
    """tokens int64 [B, T], keep bool [B, T] -> float32 [B, 8]."""
    steps = op.Cast(op.Unsqueeze(tokens, op.Constant(value_ints=[2])), to=1)
    phases = steps * op.Constant(value_floats=[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])
    return masked_mean(op.Sin(phases), keep)
