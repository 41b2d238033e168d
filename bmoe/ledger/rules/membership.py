"""Rules for genesis, members, releases and ticks."""

from __future__ import annotations

from typing import Any

from bmoe.ledger.rules.entries import (
    Genesis,
    MemberEntry,
    ModelEntry,
    Rejected,
    ReleaseEntry,
    Revocation,
    Tick,
)
from bmoe.ledger.rules.outputs import tolerances_of
from bmoe.ledger.rules.standing import Act, Record
from bmoe.ledger.rules.state import Context, Event, State
from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.keys import check_public_key
from bmoe.protocol.messages import Member, ModelRelease, Release, Sealed, open_message

RULES_VERSION = 1


def quorum_of(validators: int) -> int:
    """How many validators' word makes a size final: floor(2N/3) + 1."""
    return 2 * validators // 3 + 1


def genesis(state: State, context: Context, entry: Genesis) -> list[Event]:
    """Only once, first, by the registrar, with the quorum that its validators imply."""
    if state.origin:
        raise RefusedError("this ledger has its genesis already")
    _only(state, entry.author, "registrar")
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
    _only(state, entry.author, "registrar")
    sealed = open_message(Member, entry.statement)
    _certified(state, sealed)
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
    _only(state, entry.author, "registrar")
    if entry.member not in state.agents:
        raise RefusedError(f"{entry.member} is not an enrolled agent")
    events = state.act(entry.member, Act.DISMISSED)
    return [Event("revoked", {"agent": entry.member, "reason": entry.reason}), *events]


def release(state: State, context: Context, entry: ReleaseEntry) -> list[Event]:
    """A version of an expert or gate becomes usable."""
    _only(state, entry.author, "registrar")
    sealed = open_message(Release, entry.statement)
    _certified(state, sealed)
    statement = sealed.header
    if any(len(o[3]) != 8 for o in statement.outputs):
        raise MessageError("an output's tolerance is 8 bytes of float64")
    tolerances_of(statement)  # raises for a dtype or an epsilon that no vote could use
    known = state.releases.get(statement.digest)
    # Verdicts under way and receipts of old ones are judged by it, so what it says of tensors never changes.
    if known is not None and (known.batch, known.inputs, known.outputs) != (
        statement.batch, statement.inputs, statement.outputs,
    ):  # fmt: skip
        raise RefusedError(f"expert {statement.digest.hex()[:16]} is released with other tensors or tolerances")
    state.releases[statement.digest] = statement
    state.release_statements[statement.digest] = entry.statement
    return [Event("release", {"model": statement.model, "expert": statement.digest})]


def model(state: State, context: Context, entry: ModelEntry) -> list[Event]:
    """A version of a model becomes the one in use; all its parts must be released."""
    _only(state, entry.author, "registrar")
    sealed = open_message(ModelRelease, entry.statement)
    _certified(state, sealed)
    statement = sealed.header
    parts = [*statement.experts, *([statement.gate] if statement.gate else [])]
    missing = [d.hex()[:16] for d in parts if d not in state.releases]
    if missing:
        raise RefusedError(f"model {statement.model} names parts without a release: {', '.join(missing)}")
    if not 1 <= statement.top_k <= len(statement.experts):
        raise MessageError(f"top_k is {statement.top_k}, the model has {len(statement.experts)} experts")
    known = state.versions.get((statement.model, statement.version))
    if known is not None and _parts(known) != _parts(statement):
        raise RefusedError(f"model {statement.model} has another version {statement.version}: give it the next number")
    state.models[statement.model] = state.versions[(statement.model, statement.version)] = statement
    state.model_statements[statement.model] = entry.statement
    return [Event("model", {"model": statement.model, "version": statement.version})]


def _parts(model: ModelRelease) -> tuple[object, ...]:
    return model.gate, model.experts, model.top_k, model.combine, model.cacheable


def tick(state: State, context: Context, entry: Tick) -> list[Event]:
    """A validator marks the size after this entry; all validators cosign there."""
    _only(state, entry.author, "validator")
    state.tell_time(entry.author, entry.time_ms)
    return [Event("tick", {"validator": entry.author, "size": state.size + 1})]


def rejected(state: State, context: Context, entry: Rejected) -> list[Event]:
    """Nobody may write this entry: the rules do."""
    raise RefusedError("a rejected entry is written by the rules, not by an author")


def _certified(state: State, sealed: Sealed[Any]) -> None:
    """A statement that changes who or what counts must be the registrar's own, whoever enters it."""
    if sealed.header.author != "registrar":
        raise RefusedError(f"the statement is by {sealed.header.author}, not by the registrar")
    state.verify(sealed)


def _only(state: State, author: str, role: str) -> None:
    if state.role_of(author) != role:
        raise RefusedError(f"only a {role} may enter this, not {author}")
