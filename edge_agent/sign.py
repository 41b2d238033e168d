"""Signing: what every message of this device is stamped with, and the signed output of a task."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bmoe.inference.runner import RunResult
from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Output, seal_message, tensor_specs
from bmoe.protocol.text import plain
from edge_agent.admit import Admitted


@dataclass(frozen=True)
class Stamp:
    """The author's part of every header. `next_seq` gives numbers that never repeat, over crashes too."""

    signer: Signer
    name: str
    ledger: bytes
    epoch: int
    next_seq: Callable[[], int]

    def common(self) -> dict[str, Any]:
        """The fields that every header carries."""
        return {"ledger": self.ledger, "epoch": self.epoch, "author": self.name, "seq": self.next_seq()}


@dataclass(frozen=True)
class SignedOutput:
    """An output message as it is kept and published, and the root that a notice should name."""

    root: bytes
    message: bytes


def sign(stamp: Stamp, admitted: Admitted, result: RunResult) -> SignedOutput:
    """The signed output, bound to task, expert, input, us and a number; the salt is new, so the root tells nothing."""
    task, salt = admitted.task, os.urandom(SALT_BYTES)
    root = commit_rows(stamp.name, salt, result.outputs, task.rows)
    header = Output(
        **stamp.common(),
        task=task.task,
        expert=task.expert,
        input_root=task.input_root,
        rows=task.rows,
        outputs=tensor_specs(result.outputs),
        output_root=root,
        provider=plain(result.provider, 64),
        duration_us=result.duration_us,
    )
    return SignedOutput(root, seal_message(stamp.signer, header, [salt, *(t.data for t in result.outputs)]))
