"""Mosquitto's access list, out of the same table of permissions that the callout on NATS grants by. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from bmoe.protocol.topics import DOWN, REQUEST, ROOT, UP
from coordinator.identity.admission import permissions_of

REGISTRAR = "registrar"
BARRIER = f"{ROOT}/{REGISTRAR}/barrier"
LOGS = "$SYS/broker/log"
# Of a revoked device: its last will is published as its session is ended, so that all know that it is gone.
LAST_WORD = "status"


def acl_text(validators: Iterable[str], sessions: Iterable[tuple[str, str]], revoked: Iterable[str]) -> str:
    """The whole file. `sessions` are (device, session) pairs that have certificates of their own."""
    lines = [
        "# Written by the registrar (coordinator/identity/acl.py) and read again at SIGHUP.",
        "# A device as itself: %u is its certificate's name.",
        *_rules("pattern", "agent", "%u"),
        *_user("coordinator", "coordinator", "coordinator"),
        f"user {REGISTRAR}",
        f"topic read {LOGS}/#",
        f"topic write {BARRIER}",
    ]
    for name in validators:
        lines += _user(name, "validator", name)
    for name, session in sessions:
        lines += _user(f"{name}:{session}", "agent", name)
    for name in revoked:
        lines += [f"user {name}", *(f"topic deny {ROOT}/{name}/{channel}" for channel in _DENIED)]
    return "\n".join(lines) + "\n"


_DENIED = (*(channel for channel in (*UP, *DOWN) if channel != LAST_WORD), f"{REQUEST}/#")


def _user(user: str, role: str, name: str) -> list[str]:
    return [f"user {user}", *_rules("topic", role, name)]


def _rules(kind: str, role: str, name: str) -> list[str]:
    granted = permissions_of(role, name)
    spelled = [("write", subject) for subject in granted.publish] + [("read", subject) for subject in granted.subscribe]
    return [f"{kind} {access} {subject.replace('.', '/').replace('*', '+')}" for access, subject in spelled]
