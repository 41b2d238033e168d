"""Golden files: what was signed once reads for ever, and says the same thing.

Never rewrite a file to make this pass: a change here is a change of format, which needs a new type number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
from pathlib import Path

import pytest

from bmoe.ledger.rules.entries import ENTRIES, Answer, Genesis, Verdict, parse_entry
from bmoe.ledger.rules.frames import parse_frame
from bmoe.ledger.rules.outputs import Binding, open_output, parse_output
from bmoe.protocol.encoding import bstr
from bmoe.protocol.messages import MESSAGES, FrameHeader, Health, Member, Output, Release, Status, Task, open_message

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402

BY_CONTEXT = {cls.CONTEXT: cls for cls in MESSAGES.values()}
TASK, LEDGER = bytes(range(16, 32)), bytes(range(16))


def _read(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_the_generator_still_gives_the_very_bytes() -> None:
    made = make.files()
    assert {p.name for p in GOLDEN.glob("*.cbor")} == set(made)
    assert [name for name, data in made.items() if _read(name) != data] == []


def test_every_type_of_message_and_entry_has_its_file() -> None:
    messages = {p.stem.removeprefix("message-") for p in GOLDEN.glob("message-*.cbor")}
    assert messages == {c.split("/")[1] for c in BY_CONTEXT} - {"frame"}
    entries = {p.stem.removeprefix("entry-").replace("-", " ") for p in GOLDEN.glob("entry-*.cbor")}
    assert entries == {cls.CONTEXT for cls in ENTRIES.values()}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("message-*.cbor")), ids=lambda p: p.stem)
def test_a_message_reads_verifies_and_is_spelled_one_way(path: Path) -> None:
    cls = BY_CONTEXT[f"bmoe/{path.stem.removeprefix('message-')}/v1"]
    sealed = open_message(cls, path.read_bytes(), parts_max=2)
    sealed.verify(make.SIGNERS[sealed.header.author].public_key)
    assert sealed.header.to_bytes() == sealed.envelope.payload
    assert sealed.message() == path.read_bytes() and sealed.envelope.encode() == sealed.raw


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("entry-*.cbor")), ids=lambda p: p.stem)
def test_an_entry_reads_and_is_spelled_one_way(path: Path) -> None:
    entry = parse_entry(path.read_bytes())
    assert entry is not None and path.stem.removeprefix("entry-").replace("-", " ") == entry.CONTEXT
    assert (entry.ledger, entry.epoch, entry.seq, entry.time_ms) == (LEDGER, 1, 7, 1_800_000_000_123)
    assert entry.to_bytes() == path.read_bytes()


def test_type_numbers_are_these_for_ever() -> None:
    assert {n: c.__name__ for n, c in (MESSAGES | ENTRIES).items()} == {
        1: "Task", 2: "Output", 3: "Refusal", 4: "Status", 5: "Health", 6: "Notice", 7: "Complaint", 8: "Member",
        9: "Enrolment", 10: "Promise", 11: "Release", 12: "ModelRelease", 13: "Update", 14: "Installed",
        16: "FrameHeader", 32: "Genesis",
        33: "MemberEntry", 34: "Revocation", 35: "ReleaseEntry", 36: "ModelEntry", 37: "Opened", 38: "Verdict",
        39: "Answer", 40: "Challenge", 41: "Confirmation", 42: "ComplaintEntry", 43: "Equivocation", 44: "Tick",
        45: "Rejected", 48: "Withdrawal", 52: "Rollout",
    }  # fmt: skip


def test_a_task_and_its_output_say_what_they_said() -> None:
    task = open_message(Task, _read("message-task.cbor"), parts_max=2)
    assert task.header == Task(
        ledger=LEDGER, epoch=1, author="coordinator", seq=7, task=TASK, agent="agent-1", model="toy",
        expert=bytes([0xE1] * 32), rows=2, inputs=(("x", "float32", (2, 2)),), input_root=task.header.input_root,
        deadline_ms=1_800_000_002_123, timeout_ms=1000,
    )  # fmt: skip
    assert task.parts == (bytes(range(48, 64)), struct.pack("<4f", 1, 2, 3, 4))
    output = open_message(Output, _read("message-output.cbor"), parts_max=2)
    binding = Binding(TASK, task.header.expert, task.header.input_root, 2)
    assert parse_output(output.raw, binding).header == output.header
    (tensor,) = open_output(output.header, b"".join(map(bstr, output.parts)))
    assert struct.unpack("<2f", tensor.data) == (1.5, -3.5) and (tensor.name, tensor.dims) == ("y", (2, 1))


def test_statements_say_what_they_said() -> None:
    member = open_message(Member, _read("message-member.cbor")).header
    assert (member.member, member.role, member.owner, member.batch) == ("agent-1", "agent", "ada", "2027-01")
    release = open_message(Release, _read("message-release.cbor")).header
    assert release.outputs == (("y", "float32", (0, 1), bytes.fromhex("3ee4f8b588e368f1")),) and release.batch is True
    status = open_message(Status, _read("message-status.cbor")).header
    assert (status.state, status.board, status.memory_mb, status.queue_limit) == ("online", "Raspberry Pi 5", 4096, 8)
    health = open_message(Health, _read("message-health.cbor")).header
    assert (health.known, health.temperature_mc, health.unreported) == ((8, 9, 10), 51_000, 3)


def test_entries_say_what_they_said() -> None:
    genesis, verdict, answer = (parse_entry(_read(f"entry-{n}.cbor")) for n in ("genesis", "verdict", "answer"))
    assert isinstance(genesis, Genesis) and (genesis.origin, genesis.quorum) == ("bmoe.example/ledger", 1)
    assert isinstance(verdict, Verdict) and isinstance(answer, Answer)
    assert (verdict.policy, verdict.assigned, verdict.accepted, verdict.stances, verdict.as_of) == (
        "referee", ("agent-1", "agent-2"), 0, "aa", 12,
    )  # fmt: skip
    assert struct.unpack("<2f", answer.weights) == (1.0, 1.0) and answer.tasks == (TASK,) == (verdict.task,)


def test_a_whole_frame_reads_and_pins_what_it_carries() -> None:
    frame = parse_frame(_read("frame.cbor"))
    frame.sealed.verify(make.SIGNERS["coordinator"].public_key)
    assert isinstance(frame.header, FrameHeader) and frame.entries == (
        _read("entry-opened.cbor"), _read("entry-verdict.cbor"),
    )  # fmt: skip
    assert list(frame.attachments.values()) == [bstr(bytes(range(48, 64))) + bstr(struct.pack("<2f", 1.5, -3.5))]
    assert frame.missing == (hashlib.sha256(bytes(64 * 1024 + 1)).digest(),)


def test_an_entry_of_a_later_version_is_kept_as_an_opaque_leaf() -> None:
    tick = parse_entry(_read("entry-tick.cbor"))
    assert tick is not None
    later = type("Later", (type(tick),), {"TYPE": 199, "CONTEXT": "later"})
    assert parse_entry(later(**{f.name: getattr(tick, f.name) for f in dataclasses.fields(tick)}).to_bytes()) is None
