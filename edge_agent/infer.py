"""Inference: an admitted task's inputs through its expert, within the time that is left."""

from __future__ import annotations

import time

from bmoe.inference.runner import Runner, RunResult
from bmoe.protocol.errors import InferenceError, MessageError
from edge_agent.admit import Admitted, check_specs
from edge_agent.experts import Served


async def infer(admitted: Admitted, served: Served, runner: Runner) -> RunResult:
    """The expert's outputs. Raises what the runner raises, and InferenceError when the outputs are not those that the
    release declares: they would be counted as unusable."""
    task = admitted.task
    left_ms = task.deadline_ms - time.time_ns() // 1_000_000
    # Our clock may be ahead of the coordinator's; admission has allowed for that, so the clock alone kills no task.
    timeout_ms = min(task.timeout_ms, max(left_ms, 1000))
    if timeout_ms < 1:
        raise InferenceError("the task allows no time")
    result = await runner.run(served.file, admitted.inputs, timeout_s=timeout_ms / 1000)
    try:
        check_specs(result.outputs, served.release.outputs, task.rows, served.release.batch)
    except MessageError as error:
        raise InferenceError(f"{served.file} does not give what its release declares: {error}") from None
    return result
