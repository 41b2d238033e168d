"""Writes the golden format files: one signed message of every type, one entry of every type, one whole frame.

They must read for ever. A file once released is never written anew: if a format must change, it gets a new type number
and a new golden file beside the old one, which today's reader must still read. `python tests/golden/make.py` writes only
files that are absent; the test checks that the generator still gives the very bytes of those that are there.

Fixed keys (32 equal bytes each), so nothing here is secret, and nothing signed here means anything.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

from bmoe.ledger.rules import entries
from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.frames import NO_FRAME, build_frame
from bmoe.ledger.rules.outputs import opening_of
from bmoe.protocol import messages
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import seal_header, seal_message, tensor_specs
from bmoe.protocol.schema import Header
from bmoe.protocol.tensors import Tensor

FOLDER = Path(__file__).parent
LEDGER, TASK, REQUEST = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))
EXPERT, GATE = bytes([0xE1] * 32), bytes([0xE2] * 32)
SALT, TIME_MS = bytes(range(48, 64)), 1_800_000_000_123
SIGNERS = {
    name: Signer.from_bytes(bytes([i + 1] * 32))
    for i, name in enumerate(("registrar", "coordinator", "validator-1", "agent-1", "agent-2"))
}
X = Tensor("x", "float32", (2, 2), struct.pack("<4f", 1.0, 2.0, 3.0, 4.0))
Y = Tensor("y", "float32", (2, 1), struct.pack("<2f", 1.5, -3.5))
ROOT = commit_rows("", SALT, [X], 2)


def common(author: str, seq: int = 7) -> dict[str, Any]:
    """The fields of every header."""
    return {"ledger": LEDGER, "epoch": 1, "author": author, "seq": seq}


def task() -> messages.Task:
    """A task of two rows for agent-1."""
    return messages.Task(
        **common("coordinator"), task=TASK, agent="agent-1", model="toy", expert=EXPERT, rows=2, inputs=tensor_specs([X]),
        input_root=ROOT, deadline_ms=TIME_MS + 2000, timeout_ms=1000,
    )  # fmt: skip


def output(author: str = "agent-1") -> messages.Output:
    """An agent's answer to it."""
    return messages.Output(
        **common(author), task=TASK, expert=EXPERT, input_root=ROOT, rows=2, outputs=tensor_specs([Y]),
        output_root=commit_rows(author, SALT, [Y], 2), provider="CPUExecutionProvider", duration_us=1234,
    )  # fmt: skip


def _statements() -> dict[str, Header]:
    registrar, agent, coordinator = common("registrar"), common("agent-1"), common("coordinator")
    specs = {"inputs": (("x", "float32", (0, 2)),), "outputs": (("y", "float32", (0, 1), struct.pack(">d", 1e-5)),)}
    return {
        "task": task(),
        "output": output(),
        "refusal": messages.Refusal(**agent, task=TASK, reason="busy", detail="queue of 8 is full"),
        "status": messages.Status(
            **agent, state="online", started_ms=TIME_MS, version="0.1.0", board="Raspberry Pi 5",
            provider="CPUExecutionProvider", memory_mb=4096, queue_limit=8,
        ),
        "health": messages.Health(
            **agent, time_ms=TIME_MS, known=(8, 9, 10), cpu_percent=12, temperature_mc=51_000, memory_free_mb=2048,
            throttled=0, queued=1, answered=100, refused=2, unreported=3,
        ),
        "notice": messages.Notice(
            **coordinator, verdicts=((TASK, "accepted", "agree", output().output_root),)
        ),
        "complaint": messages.Complaint(**agent, task=TASK, reason="missing"),
        "member": messages.Member(
            **registrar, member="agent-1", role="agent", public_key=SIGNERS["agent-1"].public_key, owner="ada",
            batch="2027-01", spki=bytes([0x5B] * 32), issued_ms=TIME_MS,
        ),
        "enrolment": messages.Enrolment(
            ledger=bytes(16), epoch=0, author="agent-1", seq=0, public_key=SIGNERS["agent-1"].public_key,
            csr_digest=bytes([0xC5] * 32), token=bytes(range(8)),
        ),
        "promise": messages.Promise(
            **coordinator, request=REQUEST, request_root=ROOT, result_root=commit_rows("", SALT, [Y], 2), tasks=(TASK,),
            deadline_ms=TIME_MS + 30_000,
        ),
        "release": messages.Release(
            **registrar, model="toy", expert_name="toy-a", digest=EXPERT, size=1000, opset=17, memory_mb=64, batch=True,
            **specs, owner="ada", issued_ms=TIME_MS,
        ),
        "model-release": messages.ModelRelease(
            **registrar, model="toy", version=3, manifest=bytes([0x3A] * 32), gate=GATE, experts=(EXPERT,), top_k=1,
            combine="weighted_sum", cacheable=False, issued_ms=TIME_MS,
        ),
        "update": messages.Update(
            **coordinator, agent="agent-1", rollout=bytes(range(64, 80)), model="toy", version=3, digests=(EXPERT,),
            carrier="flower", superlink="192.0.2.7:9443", issued_ms=TIME_MS,
        ),
        "installed": messages.Installed(
            **agent, rollout=bytes(range(64, 80)), model="toy", version=3, state="refused", reason="self-test: y differs",
            carrier="flower",
        ),
    }  # fmt: skip


def _entries(sealed: dict[str, bytes]) -> dict[str, entries.Entry]:
    def made(kind: type[entries.Entry], author: str, **fields: Any) -> entries.Entry:
        return kind(**common(author), time_ms=TIME_MS, **fields)

    digest = bytes([0xD1] * 32)
    validators = (("validator-1", SIGNERS["validator-1"].public_key),)
    claim = {"task": TASK, "output": _by("validator-1"), "opening": digest, "targets": (sealed["output"],)}
    claim["target_openings"] = (digest,)
    return {
        "genesis": made(
            entries.Genesis, "registrar", origin="bmoe.example/ledger", registrar=SIGNERS["registrar"].public_key,
            validators=validators, quorum=1, rules=1,
        ),
        "member-entry": made(entries.MemberEntry, "registrar", statement=sealed["member"]),
        "revocation": made(entries.Revocation, "registrar", member="agent-1", reason="stolen"),
        "release-entry": made(entries.ReleaseEntry, "registrar", statement=sealed["release"]),
        "model-entry": made(entries.ModelEntry, "registrar", statement=sealed["model-release"]),
        "opened": made(entries.Opened, "coordinator", tasks=((TASK, EXPERT, 2),)),
        "verdict": made(
            entries.Verdict, "coordinator", task=TASK, model="toy", expert=EXPERT, rows=2, input_root=ROOT,
            policy="referee", policy_version=1, assigned=("agent-1", "agent-2"),
            outputs=(sealed["output"], _by("agent-2")), referee=b"", openings=(digest, digest), as_of=12,
            outcome="accepted", accepted=0, stances="aa", reason="", tenant="public",
        ),
        "answer": made(
            entries.Answer, "coordinator", request=REQUEST, model="toy", version=3, gate=GATE, request_root=ROOT, rows=2,
            top_k=1, experts=bytes(4), weights=struct.pack("<2f", 1, 1), tasks=(TASK,), task_index=bytes(4),
            task_rows=struct.pack("<2H", 0, 1), openings=(digest,), outputs=tensor_specs([Y]),
            result_root=commit_rows("", SALT, [Y], 2), result_opening=digest, tenant="public",
        ),
        "challenge": made(entries.Challenge, "validator-1", **claim),
        "confirmation": made(entries.Confirmation, "validator-1", **claim),
        "complaint-entry": made(
            entries.ComplaintEntry, "validator-1", complaint=sealed["complaint"], task=sealed["task"],
            output=sealed["output"],
        ),
        "equivocation": made(entries.Equivocation, "coordinator", first=sealed["output"], second=_by("agent-1", seq=8)),
        "tick": made(entries.Tick, "validator-1", size=41),
        "rejected": made(entries.Rejected, "coordinator", digest=digest, reason="task 10.. is opened twice"),
        "withdrawal": made(
            entries.Withdrawal, "registrar", model="toy", version=3, digests=(EXPERT,), reason="wrong labels"
        ),
        "rollout": made(
            entries.Rollout, "coordinator", rollout=bytes(range(64, 80)), model="toy", version=3, wave=("agent-1",),
            stage="canary", reason="first wave",
        ),
    }  # fmt: skip


def _by(author: str, **changes: Any) -> bytes:
    return seal_header(SIGNERS[author], dataclasses.replace(output(author), **changes))


def files() -> dict[str, bytes]:
    """Every golden file by name."""
    statements = _statements()
    sealed = {name: seal_header(SIGNERS[header.author], header) for name, header in statements.items()}
    made = {f"message-{name}.cbor": data for name, data in sealed.items()}
    # Those two go over the wire with a salt and tensors behind the envelope.
    made["message-task.cbor"] = seal_message(SIGNERS["coordinator"], task(), [SALT, X.data])
    made["message-output.cbor"] = seal_message(SIGNERS["agent-1"], output(), [SALT, Y.data])
    leaves = {name: entry.to_bytes() for name, entry in _entries(sealed).items()}
    made |= {f"entry-{name}.cbor": leaf for name, leaf in leaves.items()}
    made["frame.cbor"], _ = build_frame(
        SIGNERS["coordinator"], **common("coordinator"), previous=NO_FRAME, time_ms=TIME_MS,
        entries=[leaves["opened"], leaves["verdict"]], attachments=[opening_of(SALT, [Y]), bytes(64 * 1024 + 1)],
    )  # fmt: skip
    return made


if __name__ == "__main__":
    for name, data in files().items():
        if not (FOLDER / name).exists():
            (FOLDER / name).write_bytes(data)
            print(f"{name}: {len(data)} bytes")
