"""Rules for genesis, members and ticks."""

from __future__ import annotations

from typing import Any

from bmoe.ledger.rules.entries import (
    Genesis,
    MemberEntry,
    Rejected,
    Revocation,
    Tick,
)
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.standing import Act, Record
from bmoe.ledger.rules.state import Context, Event, State
from bmoe.protocol.errors import RefusedError
from bmoe.protocol.keys import check_public_key
from bmoe.protocol.messages import Member, Sealed, open_message

RULES_VERSION = 1


def genesis(state: State, context: Context, entry: Genesis) -> list[Event]:
    """Only once, first, by the registrar, with the quorum that its validators imply."""
    if state.origin:
        raise RefusedError("this ledger has its genesis already")
    only(state, entry.author, "registrar")
    if entry.registrar != state.registrar:
        raise RefusedError("the genesis names another registrar key")
    if entry.rules != RULES_VERSION:
        raise RefusedError(f"the genesis wants rules version {entry.rules}, this is {RULES_VERSION}")
    validators = dict(entry.validators)
    if not validators or len(validators) != len(entry.validators) or entry.quorum != quorum_of(len(validators)):
        raise RefusedError(f"{len(validators)} validators need a quorum of {quorum_of(len(validators))}")
    if len(set(validators.values())) != len(validators):
        raise RefusedError("two validators have one key: each counts once towards the quorum")
    for public_key in validators.values():
        check_public_key(public_key)
    state.origin, state.quorum, state.validators = entry.origin, entry.quorum, validators
    return [Event("genesis", {"origin": entry.origin})]


def member(state: State, context: Context, entry: MemberEntry) -> list[Event]:
    """Enrol a member; a name keeps its first key for ever, so that its evidence keeps its meaning."""
    only(state, entry.author, "registrar")
    sealed = open_message(Member, entry.statement)
    certified(state, sealed)
    statement = sealed.header
    check_public_key(statement.public_key)
    known = state.members.get(statement.member)
    if known is not None and (known.public_key, known.role) != (statement.public_key, statement.role):
        raise RefusedError(f"{statement.member} is enrolled with another key")
    if known is None and any(m.public_key == statement.public_key for m in state.members.values()):
        raise RefusedError(f"the key of {statement.member} is enrolled under another name")
    if statement.role == "validator" and state.validators.get(statement.member) != statement.public_key:
        raise RefusedError(f"{statement.member} is not among the validators of this epoch")
    if statement.role == "registrar":
        raise RefusedError("the registrar does not enrol itself")
    state.members[statement.member] = statement
    state.statements[statement.member] = entry.statement
    if statement.role == "agent" and known is None:
        state.agents[statement.member] = Record()
    return [Event("member", {"member": statement.member, "role": statement.role, "owner": statement.owner})]


def revocation(state: State, context: Context, entry: Revocation) -> list[Event]:
    """The registrar dismisses an agent, for good."""
    only(state, entry.author, "registrar")
    if entry.member not in state.agents:
        raise RefusedError(f"{entry.member} is not an enrolled agent")
    events = state.act(entry.member, Act.DISMISSED)
    return [Event("revoked", {"agent": entry.member, "reason": entry.reason}), *events]


def tick(state: State, context: Context, entry: Tick) -> list[Event]:
    """A validator marks the size after this entry; all validators cosign there."""
    only(state, entry.author, "validator")
    state.tell_time(entry.author, entry.time_ms)
    return [Event("tick", {"validator": entry.author, "size": state.size + 1})]


def rejected(state: State, context: Context, entry: Rejected) -> list[Event]:
    """Nobody may write this entry: the rules do."""
    raise RefusedError("a rejected entry is written by the rules, not by an author")


def certified(state: State, sealed: Sealed[Any]) -> None:
    """A statement that changes who or what counts must be the registrar's own, whoever enters it."""
    if sealed.header.author != "registrar":
        raise RefusedError(f"the statement is by {sealed.header.author}, not by the registrar")
    state.verify(sealed)


def only(state: State, author: str, *roles: str) -> None:
    """Raise RefusedError unless the author has one of these roles."""
    if state.role_of(author) not in roles:
        raise RefusedError(f"only a {' or '.join(roles)} may enter this, not {author}")
