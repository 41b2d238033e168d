"""What a device with a valid certificate may send without end: it costs a bounded log, one ledger entry, and nobody else."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import ssl
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledger_fixtures import toy
from rules_helpers import founded
from structlog.testing import capture_logs
from test_decide import AGENTS, Site

from bmoe.ledger.rules.entries import ENTRIES, Equivocation, Rejected, parse_entry
from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.frames import NO_FRAME, build_frame
from bmoe.protocol.encoding import encode
from bmoe.protocol.errors import EncodingError, InputError, MessageError, RefusedError, UnavailableError
from bmoe.protocol.messages import MAX_TENSORS, MESSAGES, Output, Refusal, open_message
from bmoe.protocol.oneline import OneLine
from bmoe.protocol.schema import from_bytes
from bmoe.protocol.text import escaped, is_plain, plain
from coordinator import decide
from coordinator.fleet import WARNINGS_A_MINUTE
from coordinator.identity.authority import Authority
from coordinator.identity.callout import _certificate
from coordinator.intake import LISTS_MAX, check_lists
from coordinator.mqtt_requests import id_of
from edge_agent.certificates import is_due
from edge_agent.source_files import read_inputs

FORGED = "fine\n2027-01-01T00:00:00 level=INFO bmoe.validator all is well"
TRICKS = (
    "a\nb",
    "a\rb",
    "\x1b[2J",
    "\x00",
    "\x7f",
    "\x9b31m",
    "a\u2028b",
    "\u202etxt.exe",
    "\u2066",
    "\ufeff",
    "\ud800",
)


def test_text_that_forges_a_line_or_turns_a_terminal_around_is_refused_in_every_field() -> None:
    assert is_plain("Raspberry Pi 5 – Küche, 32 °C 🙂 日本")
    assert [t for t in TRICKS if is_plain(t)] == []
    header = Refusal(ledger=bytes(16), epoch=1, author="pi", seq=1, task=bytes(16), reason="busy", detail=FORGED)
    with pytest.raises(MessageError, match=r"refusal/v1\.detail must be text of at most 200 characters and no control"):
        from_bytes(Refusal, header.to_bytes())
    texts = [
        (cls.CONTEXT, f.name)
        for cls in (*MESSAGES.values(), *ENTRIES.values())
        for f in dataclasses.fields(cls)
        if f.metadata["expected"].startswith("text") and not f.metadata["check"](FORGED[:16])
    ]
    every = [f for cls in (*MESSAGES.values(), *ENTRIES.values()) for f in dataclasses.fields(cls)]
    assert len(texts) == sum(f.metadata["expected"].startswith("text") for f in every) >= 12


def test_what_we_say_ourselves_is_made_plain_and_what_we_log_stays_on_its_line() -> None:
    for trick in (*TRICKS, FORGED):
        assert is_plain(plain(trick, 200)) and is_plain(escaped(trick))
    assert plain("x" * 300, 200) == "x" * 200 and escaped("a\nb") == r"a\nb"
    record = logging.LogRecord("bmoe", logging.WARNING, __file__, 1, "complaint refused error=%s", (FORGED,), None)
    line = OneLine("%(levelname)s %(message)s").format(record)
    assert line == f"WARNING complaint refused error={escaped(FORGED)}" and "\n" not in line


def rejected(entry: bytes) -> str:
    """The reason in the leaf that a coordinator's entry became."""
    fleet = founded()
    common, signer = fleet.common("coordinator", 1), fleet.signers["coordinator"]
    data, _ = build_frame(signer, **common, previous=NO_FRAME, time_ms=fleet.now_ms, entries=[entry], attachments=())
    leaf = parse_entry(apply_message(fleet.state, data).leaves[0])
    assert isinstance(leaf, Rejected)
    return leaf.reason


def test_a_rejected_leaf_says_the_same_under_every_version_of_python_and_cbor2() -> None:
    """Validators must agree on each byte of a leaf. `repr` of a text follows the interpreter's Unicode tables, and a
    library words its errors as it likes: neither may get into a leaf, or one bad entry splits the validators."""
    fleet = founded()
    fields = {0: 1, 1: 34, **dict(enumerate((fleet.ledger, 1, "coordinator", 1, fleet.now_ms, "\U0001fae9"), 2))}
    assert "found '\\U0001fae9'" in rejected(encode(fields)).replace("\\\\", "\\")
    broken = rejected(b"\x9f\x00\xff")
    assert broken == "not well-formed CBOR of at most depth 6"
    with pytest.raises(EncodingError, match="depth 6"):
        from_bytes(Refusal, b"\x81" * 50)


async def test_a_device_that_signs_a_thousand_answers_to_one_task_writes_one_entry(tmp_path: Path) -> None:
    site = Site(tmp_path)
    job, task = site.job("quorum")
    site.decider.start(job)
    liar, second, third = [await site.asked.get() for _ in AGENTS]
    with capture_logs() as lines:
        for turn in range(1000):
            message = site.ledger.output(liar, task, toy(task.x) + turn).message
            site.decider.on_output(open_message(Output, message, MAX_TENSORS + 1))
    site.disk.set()
    site.answer(second, task)
    site.answer(third, task)
    await asyncio.gather(*site.running)
    entries = [parse_entry(leaf) for applied in site.applied for leaf in applied.leaves]
    assert sum(isinstance(entry, Equivocation) for entry in entries) == 1
    assert site.ledger.state.standing(liar).value == "revoked"
    assert sum(line["event"] == "equivocation" for line in lines) == WARNINGS_A_MINUTE


async def test_a_refusal_said_again_and_again_makes_nobody_look_idle(tmp_path: Path) -> None:
    """Load is what an agent has in hand. One that refused one task a hundred times once looked free of all its tasks."""
    site = Site(tmp_path)
    jobs = [site.job("quorum")[0] for _ in range(3)]
    for job in jobs:
        site.decider.start(job)
    for _ in range(3 * len(AGENTS)):
        await site.asked.get()
    load = site.decider._fleet.of("agent-1").load
    for _ in range(100):
        site.decider.on_refusal("agent-1", jobs[0].task, "busy", "")
    assert (load, site.decider._fleet.of("agent-1").load) == (3, 2)
    for work in site.running:
        work.cancel()
    await asyncio.gather(*site.running, return_exceptions=True)


async def test_more_tasks_than_the_ledger_can_hold_open_are_refused_and_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules reject what is opened beyond OPEN_MAX; the answers that rested on it would be false."""
    monkeypatch.setattr(decide, "TASKS_OPEN_MAX", 2)
    site = Site(tmp_path)
    jobs = [site.job("quorum")[0] for _ in range(3)]
    for job in jobs[:2]:
        site.decider.start(job)
        for _ in AGENTS:
            await site.asked.get()
    site.decider.start(jobs[2])
    with pytest.raises(UnavailableError, match="2 tasks are in work, the limit: try again"):
        await jobs[2].calls[0].done
    assert site.decider.running == len(site.ledger.state.open) == 2
    for work in site.running:
        work.cancel()
    await asyncio.gather(*site.running, return_exceptions=True)


JSON_BOMBS: dict[str, bytes] = {
    "deep nesting": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "an endless number": b'{"error": ' + b"9" * 50_000 + b"}",
    "not UTF-8": b'{"error": "\xff"}',
    "another kind": b"[1, 2]",
    "null": b"null",
    "nothing": b"",
}


def readers(folder: Path) -> dict[str, Any]:
    """Every reader of JSON that lies in a file or comes from a server: name -> what it makes of bytes."""
    from bmoe.client import _error, read_answer
    from bmoe.ledger.receipts import read_reply
    from bmoe.protocol.figures import read_figures
    from bmoe.storage.client import _refusal
    from coordinator.embedded.ports import read_ports
    from coordinator.fleet import DurableStorage
    from coordinator.state_layout import StateLayout
    from edge_agent.identity import load_identity

    def file(name: str, data: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return {
        "client": lambda data: read_answer(data, None),
        "client, binary": lambda data: read_answer(data, str(len(data))),
        "client's errors": lambda data: _error(SimpleNamespace(status=400, headers={}), data),  # type: ignore[arg-type]
        "validator's errors": lambda data: _refusal(500, data, "/x"),
        "receipt replies": lambda data: read_reply(b"{" + data),
        "identity": lambda data: load_identity(file("identity/identity.json", data).parent.parent),
        "figures": lambda data: read_figures(file("figures.json", data)),
        "ports": lambda data: read_ports(file("ports.json", data).parent),
        "reach": lambda data: StateLayout(file("reach.json", data).parent).dial("host"),
        "view": lambda data: DurableStorage(file("fleet.json", data)).read(),
    }


def test_json_of_any_kind_gives_a_value_or_one_error_of_ours(tmp_path: Path) -> None:
    from bmoe.protocol.errors import BmoeError

    for name, read in readers(tmp_path).items():
        for story, data in JSON_BOMBS.items():
            try:
                read(data)
            except BmoeError as error:
                assert is_plain(str(error)) and len(str(error)) < 1000, (name, story, str(error)[:200])


GOOD_REPLY: dict[str, Any] = {
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],
    "parameters": {"request": "0", "verdicts": [], "stage": "decided", "assurance": "verified"},
}


@pytest.mark.parametrize(
    "changed",
    [
        {"outputs": None}, {"outputs": [1]}, {"outputs": [{}]}, {"parameters": None}, {"parameters": {}},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1 << 40, 1 << 40], "data": [1]}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1 << 53, 1 << 53, 0], "data": []}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [0] * 100, "data": []}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1], "data": [1]}]},
        {"outputs": [{"name": "y", "datatype": "??", "shape": [1], "data": [1]}]},
        {"outputs": [{"name": "y", "datatype": "INT8", "shape": [1], "data": [1e300]}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [3], "data": ["x" * 100_000, 1, 2]}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": "4"}}]},
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "parameters": [1]}]},
    ],
)  # fmt: skip
def test_a_reply_that_is_no_answer_is_said_to_be_none(changed: dict[str, Any]) -> None:
    from bmoe.client import read_answer

    assert read_answer(json.dumps(GOOD_REPLY).encode(), None).outputs["y"].tolist() == [[1, 2]]
    with pytest.raises(UnavailableError, match=r"cannot be read|no JSON object|malformed"):
        read_answer(json.dumps({**GOOD_REPLY, **changed}).encode(), None)


@pytest.mark.parametrize("shape", [[1 << 53, 1 << 53, 0], [0] * 100])
def test_a_board_refuses_a_reply_of_a_shape_that_no_array_can_have(shape: list[int]) -> None:
    from edge_agent.oip import outputs_of

    with pytest.raises(MessageError, match="no array has the shape"):
        outputs_of({"outputs": [{"name": "y", "datatype": "FP32", "shape": shape, "data": []}]})


def test_a_body_of_lists_is_refused_before_it_is_parsed_and_one_of_numbers_is_not() -> None:
    lists, numbers = b'{"data":[' + b"[]," * LISTS_MAX + b"[]]}", b'{"data":[' + b"0," * (2 * LISTS_MAX) + b"0]}"
    tracemalloc.start()
    with pytest.raises(MessageError, match=f"at most {LISTS_MAX} are taken: send data flat"):
        check_lists(lists, len(lists))
    with pytest.raises(MessageError, match="send data flat"):
        id_of(b'{"id":"a",' + lists[1:])
    check_lists(numbers, len(numbers))
    assert id_of(b'{"id":"a",' + numbers[1:]) == "a"
    check_lists(b"{}" + lists, 2)  # what lies behind a JSON head is no JSON
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_certificate_of_a_version_that_is_none_is_refused_like_any_other(tmp_path: Path) -> None:
    """The library's error for it is no ValueError: it once ended the renewing of a board's certificate for good."""
    authority = Authority.open(tmp_path)
    der = ssl.PEM_cert_to_DER_cert(authority.pem.decode())
    odd = ssl.DER_cert_to_PEM_cert(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x06", 1)).encode()
    assert is_due(authority.pem) is False
    with pytest.raises(InputError, match="6 is not a valid X509 version"):
        is_due(odd)
    with pytest.raises(RefusedError, match="cannot be read: 6 is not a valid X509 version"):
        _certificate({"client_tls": {"verified_chains": [[odd.decode()]]}})


def test_an_array_file_of_a_shape_beyond_all_numbers_is_refused() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }"
    header += b" " * (117 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    model = SimpleNamespace(inputs=(("x", "float32", (0, 2)),), batch=True)
    with pytest.raises(MessageError, match=r"x\.npy cannot be read"):
        read_inputs("x.npy", data, model, 1 << 20)  # type: ignore[arg-type]
