"""The ledger's two streams: made once by the administrator's connection, and checked whenever the gateway comes up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bmoe.protocol.errors import LedgerError

LEDGER = "LEDGER"
CHECKPOINTS = "CHECKPOINTS"
CHECKPOINTS_KEPT = 64  # for each validator; a newer cosignature covers the older ones
API_SECONDS = 5.0
API_ATTEMPTS = 3
STREAM_NOT_FOUND = 10059
DUPLICATE_WINDOW = 600 * 10**9  # nanoseconds

_COMMON: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_consumers": -1,
    "duplicate_window": DUPLICATE_WINDOW,
    "deny_delete": True,
    "allow_direct": True,
}
# Nothing may ever make room in the ledger: no limits, and where the disk is full, refuse the new.
_LEDGER = _COMMON | {
    "name": LEDGER,
    "subjects": ["ledger.frame.>"],
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "discard": "new",
    "deny_purge": True,
}
_CHECKPOINTS = _COMMON | {
    "name": CHECKPOINTS,
    "subjects": ["ledger.checkpoint.>"],
    "max_msgs_per_subject": CHECKPOINTS_KEPT,
    "max_msg_size": 65536,
    "discard": "old",
    "deny_purge": True,
}
# Settings under which an entered frame can vanish, change, or be acknowledged before it is on disk.
_FORBIDDEN = (
    "allow_rollup_hdrs",
    "allow_msg_ttl",
    "allow_msg_schedules",
    "allow_msg_counter",
    "subject_delete_marker_ttl",
    "sealed",
    "no_ack",
    "mirror",
    "sources",
    "subject_transform",
    "republish",
)
_ALLOWED: Mapping[str, Callable[[Any, Any], bool]] = {
    "duplicate_window": lambda found, wanted: found >= wanted,
    "num_replicas": lambda found, wanted: found >= wanted,
}


async def ensure_ledger_stream(nc: Client, *, replicas: int = 1) -> bool:
    """Make the stream LEDGER if it is missing; True if it was. Raises LedgerError for one with weaker settings."""
    return await _ensure(nc, _LEDGER | {"num_replicas": replicas})


async def ensure_checkpoint_stream(nc: Client, *, replicas: int = 1) -> bool:
    """Make the stream CHECKPOINTS (the newest 64 of each validator) if it is missing; otherwise as the above."""
    return await _ensure(nc, _CHECKPOINTS | {"num_replicas": replicas})


def weaknesses(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What makes the stream configuration `found` weaker than `wanted`, one sentence part for each setting."""
    faults = [
        f"{key} is {found.get(key)!r}, expected {value!r}"
        for key, value in wanted.items()
        if key not in found or not _ALLOWED.get(key, lambda a, b: a == b)(found[key], value)
    ]
    faults += [f"{key} is set to {found[key]!r}, expected it unset" for key in _FORBIDDEN if found.get(key)]
    if found.get("persist_mode", "default") not in ("", "default"):
        faults.append(f"persist_mode is {found['persist_mode']!r}, expected 'default'")
    return faults


async def _ensure(nc: Client, wanted: dict[str, Any]) -> bool:
    name = wanted["name"]
    answer = await _api(nc, f"STREAM.INFO.{name}", {})
    made = answer.get("error", {}).get("err_code") == STREAM_NOT_FOUND
    if made:
        answer = await _api(nc, f"STREAM.CREATE.{name}", wanted)
    if "error" in answer:
        raise LedgerError(f"stream {name}: the server answers {answer['error']}")
    faults = weaknesses(answer.get("config", {}), wanted)
    if faults:
        raise LedgerError(f"stream {name} is weaker than the ledger needs: {'; '.join(faults)}")
    return made


async def _api(nc: Client, call: str, body: Mapping[str, Any]) -> dict[str, Any]:
    for attempt in range(API_ATTEMPTS):
        try:
            reply = await nc.request(f"$JS.API.{call}", json.dumps(body).encode(), timeout=API_SECONDS)
            answer = json.loads(reply.data)
            return answer if isinstance(answer, dict) else {"error": f"not an object: {reply.data[:80]!r}"}
        except (NatsError, ValueError) as error:
            if attempt == API_ATTEMPTS - 1:
                raise LedgerError(f"no answer to {call}: {error!r} (down, or not allowed to us)") from error
    raise AssertionError("unreachable")
