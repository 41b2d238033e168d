"""Rules for releases: experts and models published, taken back, and brought to the fleet in waves.

A model's version in use is the last one published, until a rollout holds it back or a withdrawal takes it away; then it
is the highest version that stands.
"""

from __future__ import annotations

import dataclasses

from bmoe.ledger.rules.entries import ModelEntry, ReleaseEntry, Rollout, Withdrawal
from bmoe.ledger.rules.membership import certified, only
from bmoe.ledger.rules.outputs import tolerances_of
from bmoe.ledger.rules.state import Context, Event, State, Withdrawn
from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.messages import ModelRelease, Release, open_message

# How a rollout ends. Nothing follows under its id.
ENDED = ("done", "rolled-back", "aborted")
# Tasks made before everyone had heard of a withdrawal may still be opened for so long, in ledger time.
WITHDRAWAL_GRACE_MS = 60_000


def release(state: State, context: Context, entry: ReleaseEntry) -> list[Event]:
    """A version of an expert or gate becomes usable."""
    only(state, entry.author, "registrar")
    sealed = open_message(Release, entry.statement)
    certified(state, sealed)
    statement = sealed.header
    if any(len(o[3]) != 8 for o in statement.outputs):
        raise MessageError("an output's tolerance is 8 bytes of float64")
    tolerances_of(statement)  # raises for a dtype or an epsilon that no vote could use
    if statement.digest in state.withdrawn:
        raise RefusedError(f"expert {statement.digest.hex()[:16]} is withdrawn, and what is withdrawn never comes back")
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
    only(state, entry.author, "registrar")
    sealed = open_message(ModelRelease, entry.statement)
    certified(state, sealed)
    statement = sealed.header
    missing = [d.hex()[:16] for d in _digests(statement) if d not in state.releases]
    if missing:
        raise RefusedError(f"model {statement.model} names parts without a release: {', '.join(missing)}")
    if not 1 <= statement.top_k <= len(statement.experts):
        raise MessageError(f"top_k is {statement.top_k}, the model has {len(statement.experts)} experts")
    known = state.versions.get((statement.model, statement.version))
    if known is not None and _parts(known) != _parts(statement):
        raise RefusedError(f"model {statement.model} has another version {statement.version}: give it the next number")
    if not _stands(state, statement):
        raise RefusedError(f"model {statement.model} version {statement.version} is withdrawn, or a part of it is")
    if (rolling := under_way(state, statement.model)) is not None:
        raise RefusedError(
            f"rollout {rolling.rollout.hex()} of {statement.model} is under way: let it end, or abort it"
        )
    key = (statement.model, statement.version)
    state.versions[key], state.version_statements[key] = statement, entry.statement
    state.held.discard(key)
    return _use(state, statement.model, statement)


def _parts(model: ModelRelease) -> tuple[object, ...]:
    return model.gate, model.experts, model.top_k, model.combine, model.cacheable


def withdrawal(state: State, context: Context, entry: Withdrawal) -> list[Event]:
    """The registrar takes a version back, for good, and with it those of its parts that are named."""
    only(state, entry.author, "registrar")
    key = (entry.model, entry.version)
    version = _released(state, *key)
    if strangers := set(entry.digests) - set(_digests(version)):
        raise RefusedError(f"{min(strangers).hex()[:16]} is no part of {entry.model} version {entry.version}")
    mark = Withdrawn(entry.reason, state.time_ms)
    state.withdrawn_versions.setdefault(key, mark)
    for digest in entry.digests:
        state.withdrawn.setdefault(digest, mark)
    events = [Event("withdrawn", {"model": entry.model, "version": entry.version, "reason": entry.reason})]
    # A part may belong to other versions and other models: those fall with it.
    for model in sorted({*state.models, *state.rollouts}):
        events += _end_withdrawn(state, model, entry)
        used = state.models.get(model)
        if used is not None and not _stands(state, used):
            events += _use(state, model, _fallback(state, model))
    return events


def rollout(state: State, context: Context, entry: Rollout) -> list[Event]:
    """Where a rollout stands. While it is under way, and if it ends badly, its version is not the one in use."""
    only(state, entry.author, "coordinator", "registrar")
    key = (entry.model, entry.version)
    version, known = _released(state, *key), state.rollouts.get(entry.model)
    if not _stands(state, version):
        raise RefusedError(f"{entry.model} version {entry.version} is withdrawn: it is not rolled out")
    if len(set(entry.wave)) != len(entry.wave):
        raise MessageError("an agent stands twice in the wave")
    if strangers := set(entry.wave) - set(state.agents):
        raise RefusedError(f"{min(strangers)} is not an enrolled agent")
    events = _next_stage(state, entry) if _same(known, entry) else _begin(state, entry)
    state.rollouts[entry.model] = entry
    if entry.stage == "done":
        later = {k for k in state.versions if k[0] == entry.model and k[1] > entry.version}
        state.held = (state.held | later) - {key}
        events += _use(state, entry.model, version)
    facts = {"rollout": entry.rollout, "model": entry.model, "version": entry.version, "stage": entry.stage}
    return [Event("rollout", {**facts, "reason": entry.reason}), *events]


def check_not_withdrawn(state: State, expert: bytes) -> None:
    """Raise RefusedError for an expert withdrawn longer ago than the grace."""
    mark = state.withdrawn.get(expert)
    if mark is not None and state.time_ms > mark.time_ms + WITHDRAWAL_GRACE_MS:
        raise RefusedError(f"expert {expert.hex()[:16]} is withdrawn: {mark.reason}")


def under_way(state: State, model: str) -> Rollout | None:
    """The rollout of a model that has begun and not ended."""
    known = state.rollouts.get(model)
    return known if known is not None and known.stage not in ENDED else None


def _begin(state: State, entry: Rollout) -> list[Event]:
    if (known := under_way(state, entry.model)) is not None:
        raise RefusedError(f"rollout {known.rollout.hex()} of {entry.model} is under way: let it end, or abort it")
    if entry.stage in ENDED:
        raise RefusedError(f"rollout {entry.rollout.hex()} cannot be {entry.stage}: it never began")
    key = (entry.model, entry.version)
    used = state.models.get(entry.model)
    incumbent = _fallback(state, entry.model, but=entry.version) if used == state.versions[key] else used
    if incumbent is None:
        raise RefusedError(f"{entry.model} has no version to go back to but {entry.version}: it is in use already")
    state.held.add(key)
    return _use(state, entry.model, incumbent)


def _next_stage(state: State, entry: Rollout) -> list[Event]:
    known = state.rollouts[entry.model]
    if known.stage in ENDED:
        raise RefusedError(f"rollout {entry.rollout.hex()} has ended: it is {known.stage}")
    if known.version != entry.version:
        raise RefusedError(f"rollout {entry.rollout.hex()} is of version {known.version}, not {entry.version}")
    return []


def _same(known: Rollout | None, entry: Rollout) -> bool:
    return known is not None and known.rollout == entry.rollout


def _end_withdrawn(state: State, model: str, entry: Withdrawal) -> list[Event]:
    known = under_way(state, model)
    if known is None or _stands(state, state.versions[(model, known.version)]):
        return []
    reason = f"withdrawn: {entry.reason}"[:200]
    state.rollouts[model] = dataclasses.replace(known, stage="aborted", reason=reason)
    facts = {"rollout": known.rollout, "model": model, "version": known.version, "stage": "aborted"}
    return [Event("rollout", {**facts, "reason": reason})]


def _use(state: State, model: str, version: ModelRelease | None) -> list[Event]:
    """Make a version the one in use; None takes the model out of service."""
    if version is None:
        del state.models[model], state.model_statements[model]
        return [Event("model", {"model": model, "version": 0})]
    state.models[model] = version
    state.model_statements[model] = state.version_statements[(model, version.version)]
    return [Event("model", {"model": model, "version": version.version})]


def _fallback(state: State, model: str, but: int = -1) -> ModelRelease | None:
    """The highest version that stands and is not held; never `but`."""
    keys = [k for k, v in state.versions.items() if k[0] == model and k[1] != but and _stands(state, v)]
    return max((state.versions[k] for k in keys if k not in state.held), key=lambda v: v.version, default=None)


def _stands(state: State, version: ModelRelease) -> bool:
    if (version.model, version.version) in state.withdrawn_versions:
        return False
    return not any(digest in state.withdrawn for digest in _digests(version))


def _released(state: State, model: str, version: int) -> ModelRelease:
    found = state.versions.get((model, version))
    if found is None:
        raise RefusedError(f"{model} version {version} is not on this ledger")
    return found


def _digests(version: ModelRelease) -> list[bytes]:
    return [*version.experts, *([version.gate] if version.gate else [])]
