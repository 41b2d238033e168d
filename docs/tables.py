"""The tables of these documents, made from the code: `python docs/tables.py` rewrites them, the tests compare them.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; what stands there is never edited by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmoe.ledger.rules.entries import ENTRIES, RESERVED, Entry
from bmoe.ledger.rules.policies import POLICIES
from bmoe.protocol.messages import MESSAGES
from bmoe.protocol.schema import Header
from coordinator.config import GatewaySettings
from coordinator.metrics import METRICS
from edge_agent.config import AgentSettings

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- begin ([a-z-]+) -->\n).*?(<!-- end \2 -->)", re.S)
GOLDEN = DOCS.parent / "tests" / "golden" / "message-refusal.cbor"
# Defaults that depend on the machine, as a reader should know them.
DEPENDS = {"AgentSettings.state": "`/var/lib/bmoe-agent` where writable, else `~/.local/state/bmoe-agent`"}

# Constants that a reader may have to reckon with: module, name, what it says.
LEDGER_LIMITS = (
    ("bmoe.ledger.rules.entries", "MAX_LEAF_BYTES", "bytes of one entry"),
    ("bmoe.ledger.rules.entries", "MAX_OUTPUTS", "outputs in one verdict, and agents asked for one task"),
    ("bmoe.ledger.rules.frames", "MAX_FRAME_BYTES", "bytes of one frame"),
    ("bmoe.ledger.rules.frames", "MAX_ENTRIES", "entries in one frame that a reader accepts"),
    ("bmoe.ledger.author", "FRAME_ENTRIES", "entries that an author puts into one frame"),
    ("bmoe.ledger.author", "WAITING_MAX", "groups of entries that may wait for the engine"),
    ("bmoe.ledger.rules.frames", "INLINE_BYTES", "bytes up to which an attachment rides in the frame"),
    ("bmoe.protocol.messages", "MAX_ATTACHMENT_BYTES", "bytes of one attachment"),
    ("bmoe.ledger.rules.state", "TASK_WINDOW_MS", "ms of ledger time for which a closed task can be challenged"),
    ("bmoe.ledger.rules.state", "AHEAD_MAX_MS", "ms by which a task's id may be ahead of ledger time"),
    ("bmoe.ledger.rules.state", "AS_OF_SLACK", "leaves by which `as_of` may precede the opening of its task"),
    ("bmoe.ledger.rules.standing", "TRUST_AFTER", "clean outputs from probation to trusted"),
    ("bmoe.ledger.rules.standing", "TRUST_AGAIN_AFTER", "clean outputs from doubted to trusted"),
    ("bmoe.ledger.rules.standing", "DIAGNOSES_TO_RETURN", "correct diagnosis tasks from quarantined to doubted"),
    ("bmoe.ledger.rules.standing", "REFUTATIONS_TO_REVOKE", "refutations after which an agent is revoked"),
    ("bmoe.ledger.rules.voting", "AGREE", "largest distance, in tolerances, that agrees"),
    ("bmoe.ledger.rules.voting", "NEUTRAL", "largest distance, in tolerances, that does not dissent"),
    ("bmoe.ledger.cosign", "TICK_EVERY_S", "s between the ticks of one validator"),
    ("bmoe.ledger.spotcheck", "QUEUE_MAX", "re-executions that wait in one validator"),
    ("bmoe.ledger.spotcheck", "ATTEMPTS", "times that a validator tries to re-execute what others wait for"),
    ("bmoe.ledger.spotcheck", "SPOT_ATTEMPTS", "times that it tries a draw of its own"),
    ("bmoe.ledger.spotcheck", "SUSPECTS_MAX", "verdicts re-executed after one refutation"),
    ("bmoe.ledger.store", "OPENINGS_COUNT", "openings that a validator keeps for receipts"),
    ("bmoe.ledger.store", "OPENINGS_BYTES", "bytes of the openings that a validator keeps"),
    ("bmoe.ledger.store", "NOTES_KEPT", "checkpoints that a validator keeps"),
    ("coordinator.embedded.ledger_stream", "CHECKPOINTS_KEPT", "checkpoints of each validator that the engine keeps"),
)  # fmt: skip
GATEWAY_LIMITS = (
    ("coordinator.gate", "GATE_TIMEOUT_S", "s that a gate may take"),
    ("coordinator.gateway", "FINAL_TIMEOUT_S", "s that a request with `wait=final` waits for the quorum"),
    ("coordinator.decide", "TASKS_OPEN_MAX", "tasks in work; what would be more is answered with 503"),
    ("coordinator.receipts", "RECEIPT_TIMEOUT_S", "s that the gateway waits for a validator's receipt"),
    ("bmoe.ledger.receipts", "WAIT_MS", "ms that a validator waits until an entry is under a checkpoint"),
    ("coordinator.decide", "FIRST_HEDGE_S", "s before a silent task is sent on, while an expert's pace is unknown"),
    ("coordinator.collect", "HEDGES_MAX", "times that a silent task is sent on or again"),
    ("coordinator.fleet", "SILENCE_WEIGHT", "tasks in hand that each task in a row without an answer counts as"),
    ("coordinator.fleet", "SILENCE_MAX", "tasks in a row without an answer that count"),
    ("coordinator.fleet", "SUSPICION_S", "s for which the coordinator itself stops asking an agent"),
    ("coordinator.fleet", "EVIDENCE_A_MINUTE", "refused outputs of one agent kept as evidence each minute"),
    ("coordinator.fleet", "WARNINGS_A_MINUTE", "warnings a minute on one agent; the rest are logged at `debug`"),
    ("coordinator.diagnose", "EVERY_S", "s between diagnosis tasks for an agent in quarantine"),
    ("bmoe.storage.evidence", "RETENTION_MS", "ms for which evidence is kept"),
    ("coordinator.journal", "PENDING_BYTES", "bytes of inputs that requests in work may hold in the journal"),
    ("coordinator.journal", "KEPT_MS", "ms for which the outcome of a request is kept"),
    ("coordinator.journal", "KEPT_ROWS", "outcomes kept, the oldest go first"),
    ("coordinator.journal", "KEPT_BYTES", "bytes of the results kept"),
    ("coordinator.recover", "AGAIN_MS", "ms after which a request is not run again"),
    ("coordinator.recover", "ATTEMPTS_MAX", "runs of the coordinator that one request may see begin and end"),
    ("coordinator.recover", "AT_ONCE", "requests of an earlier run that are run again at once"),
    ("coordinator.door", "HANDSHAKE_S", "s that a TLS handshake may take, on API and fleet HTTPS"),
    ("coordinator.door", "HEAD_S", "s that the head of a request may take"),
    ("coordinator.door", "HEAD_BYTES", "bytes of a request's head"),
    ("coordinator.door", "UNREAD_S", "s that an answer may lie unread"),
    ("coordinator.bodies", "BODY_S", "s that a request's body may take"),
    ("coordinator.identity.https", "CONNECTIONS_MAX", "connections to fleet HTTPS"),
    ("coordinator.identity.https", "CONNECTIONS_EACH", "connections to fleet HTTPS of one address"),
    ("coordinator.identity.authority", "DEVICE_DAYS", "days that a board's certificate is valid"),
    ("coordinator.identity.authority", "INFRASTRUCTURE_DAYS", "days that a certificate of the gateway is valid"),
    ("coordinator.identity.authority", "CA_DAYS", "days that the CA's certificate is valid"),
    ("coordinator.identity.failures", "FAILURES_MAX", "failed enrolments of one address each minute"),
    ("coordinator.up", "READY_S", "s that a process may take until it is ready, the whole ledger read"),
    ("coordinator.embedded.supervisor", "MAX_DELAY", "s of the longest pause before a process is started again"),
    ("coordinator.embedded.supervisor", "LOG_LIMIT", "bytes of a process's log before it moves to `.1`"),
    ("coordinator.mqtt_requests", "DEVICE_RUNNING", "requests over MQTT of one device in work at once"),
    ("coordinator.mqtt_requests", "DEVICE_WAITING", "requests over MQTT of one device that wait or are in work"),
    ("coordinator.mqtt_requests", "DEVICE_BYTES", "bytes of the requests over MQTT of one device"),
    ("coordinator.recent", "KEEP_S", "s for which a request over MQTT that comes again is known"),
    ("coordinator.recent", "DEVICE_COUNT", "requests of one device that are known for that"),
    ("coordinator.receive", "MAX_UP_BYTES", "bytes of one message from an agent"),
    ("edge_agent.outbox", "AHEAD_MS", "ms that a task's deadline may lie ahead of a board's clock"),
    ("bmoe.ledger.complaints", "A_MINUTE", "complaints of one agent that a validator takes each minute"),
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def settings(cls: Any) -> str:
    """Every setting of a pydantic-settings class with default, environment variable and meaning."""
    prefix = cls.model_config["env_prefix"]
    rows = []
    for name, field in cls.model_fields.items():
        default = DEPENDS.get(f"{cls.__name__}.{name}") or f"`{_value(field.default)}`"
        rows.append((f"`{name}`", default, f"`{prefix}{name.upper()}`", field.description or ""))
    return table(("setting", "default", "environment", "meaning"), rows)


def limits(constants: Iterable[tuple[str, str, str]]) -> str:
    """Constants of the code that no setting changes."""
    rows = []
    for module, name, meaning in constants:
        value = getattr(importlib.import_module(module), name)
        rows.append((f"`{name}`", f"{value:,}" if type(value) is int else f"{value:g}", meaning, _path(module)))
    return table(("constant", "value", "meaning", "in"), rows)


def metrics() -> str:
    """Every metric of a gateway."""
    rows = ((f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.meaning) for m in METRICS)
    return table(("metric", "type", "labels", "meaning"), rows)


def message_types() -> str:
    """Type numbers of messages, with what the signature binds."""
    rows = ((str(n), f"`{c.__name__}`", f"`{c.CONTEXT}`", _first_sentence(c)) for n, c in sorted(MESSAGES.items()))
    return table(("type", "name", "context", "meaning"), rows)


def entry_types() -> str:
    """Type numbers of entries, which carry no signature of their own."""
    rows = ((str(n), f"`{c.__name__}`", _first_sentence(c)) for n, c in sorted(ENTRIES.items()))
    return table(("type", "name", "meaning"), rows)


def fields(kinds: Mapping[int, type[Header]], common: type[Header]) -> str:
    """The header keys of each type, without those that all share."""
    shared = {field.name for field in dataclasses.fields(common)}
    rows = []
    for number, cls in sorted(kinds.items()):
        own = sorted((f.metadata["key"], f) for f in dataclasses.fields(cls) if f.name not in shared)
        for key, field in own:
            rows.append((f"{number} `{cls.__name__}`", str(key), f"`{field.name}`", field.metadata["expected"]))
    return table(("type", "key", "field", "value"), rows)


def policies() -> str:
    """The policies by name."""
    rows = (
        (f"`{p.name}` {p.version}", str(p.replicas(100)), "yes" if p.distinct_owners else "no", _module_sentence(p))
        for p in POLICIES.values()
    )
    return table(("policy, version", "agents asked first, of 100", "owners kept apart", "rule"), rows)


def example() -> str:
    """A golden message in hexadecimal, 32 bytes a line: it must read for ever, so it never changes."""
    data = GOLDEN.read_bytes().hex()
    return "```text\n" + "".join(data[i : i + 64] + "\n" for i in range(0, len(data), 64)) + "```\n"


TABLES: dict[str, Callable[[], str]] = {
    "gateway-settings": lambda: settings(GatewaySettings),
    "agent-settings": lambda: settings(AgentSettings),
    "gateway-limits": lambda: limits(GATEWAY_LIMITS),
    "ledger-limits": lambda: limits(LEDGER_LIMITS),
    "metrics": metrics,
    "policies": policies,
    "message-types": message_types,
    "message-fields": lambda: fields(MESSAGES, Header),
    "entry-types": entry_types,
    "entry-fields": lambda: fields(ENTRIES, Entry),
    "reserved-types": lambda: table(("type", "kept for"), ((str(n), word) for n, word in RESERVED.items())),
    "example": example,
}


def renewed(text: str) -> str:
    """A document with its tables made anew; raises KeyError for a block of no known name."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def main() -> None:
    """Rewrite every document whose tables have changed."""
    for path in sorted(DOCS.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = renewed(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path.name}", file=sys.stderr)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return "none" if value is None else str(value)


def _path(module: str) -> str:
    return f"`{module.replace('.', '/')}.py`"


def _first_sentence(cls: type) -> str:
    return re.split(r"(?<=[.])\s", " ".join((cls.__doc__ or "").split()))[0]


def _module_sentence(policy: Any) -> str:
    doc = sys.modules[policy.decide.__module__].__doc__ or ""
    line = " ".join(doc.split("\n\n")[0].split())
    return re.sub(r"^`\w+`(?:, the default)?: ", "", line)


if __name__ == "__main__":
    main()
