"""A coordinator's side of a task, a release, and a board's identity on disk: for the tests of the agent."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
import time
from typing import Any

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Member, Release, Task, seal_message, tensor_specs
from bmoe.protocol.tensors import Tensor
from edge_agent.admit import Load, Rules, coordinators_of

LEDGER = b"L" * 16
NAME = "pi-1"
FREE = Load(in_work=False, answered=False, floor_ms=0, room=True)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def window(rows: int, seed: int = 1) -> Tensor:
    """x float32[rows, 4], as onnx_models.mlp takes it."""
    values = [((seed * 7 + i) % 11) / 11 for i in range(rows * 4)]
    return Tensor("x", "float32", (rows, 4), struct.pack(f"<{rows * 4}f", *values))


@dataclasses.dataclass
class Gateway:
    """The keys of a registrar and a coordinator, and what they sign."""

    registrar: Signer = dataclasses.field(default_factory=Signer.generate)
    coordinator: Signer = dataclasses.field(default_factory=Signer.generate)
    seq: int = 0

    def common(self, author: str) -> dict[str, Any]:
        self.seq += 1
        return {"ledger": LEDGER, "epoch": 0, "author": author, "seq": self.seq}

    def member(self, name: str, role: str, key: bytes, **change: Any) -> Member:
        fields = {**self.common("registrar"), "member": name, "role": role, "public_key": key, "owner": "acme",
                  "batch": "", "spki": bytes(32), "issued_ms": 0}  # fmt: skip
        return Member(**{**fields, **change})

    def rules(self, **change: Any) -> Rules:
        """What an agent called pi-1 admits by."""
        members = [self.member("coordinator", "coordinator", self.coordinator.public_key)]
        rules = Rules(NAME, LEDGER, 0, coordinators_of(members), 1 << 20, 512, 2000)
        return dataclasses.replace(rules, **change)

    def task(self, expert: bytes = bytes(32), rows: int = 2, **change: Any) -> bytes:
        """A task message; `change` overrules header fields, `signer`, `parts` and `inputs`."""
        inputs = change.pop("inputs", [window(max(rows, 1))])
        salt = os.urandom(16)
        root = commit_rows("", salt, inputs, max(rows, 1))
        parts = change.pop("parts", [salt, *(t.data for t in inputs)])
        signer = change.pop("signer", self.coordinator)
        fields = {
            **self.common("coordinator"), "task": os.urandom(16), "agent": NAME, "model": "wearable", "expert": expert,
            "rows": rows, "inputs": tensor_specs(inputs), "input_root": root, "deadline_ms": now_ms() + 5000,
            "timeout_ms": 5000,
        }  # fmt: skip
        return seal_message(signer, Task(**{**fields, **change}), parts)

    def release(self, model: bytes, **change: Any) -> bytes:
        """The signed release of onnx_models.mlp() or of whatever `change` says."""
        signer = change.pop("signer", self.registrar)
        epsilon = struct.pack(">d", 1e-4)
        fields = {
            **self.common("registrar"), "model": "wearable", "expert_name": "mlp",
            "digest": hashlib.sha256(model).digest(), "size": len(model), "opset": 17, "memory_mb": 64, "batch": True,
            "inputs": (("x", "float32", (0, 4)),),
            "outputs": (("probabilities", "float32", (0, 3), epsilon), ("label", "int64", (0,), bytes(8))),
            "owner": "acme", "issued_ms": 0,
        }  # fmt: skip
        return seal_message(signer, Release(**{**fields, **change}))
