"""Which version of a model a rollout may begin with; and why not."""

from __future__ import annotations

from bmoe.ledger.rules.releases import under_way
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import RefusedError, UnknownError
from bmoe.protocol.messages import Release


def startable(state: State, model: str, version: int | None) -> int:
    """The version to begin with: the one given, else the one that is held for it, else the newest that is not in use.

    Raises UnknownError for a version that is not on the ledger, RefusedError for one that cannot be rolled out now.
    """
    known, used = under_way(state, model), state.models.get(model)
    if known is not None and (known.stage != "paused" or known.wave):
        raise RefusedError(f"rollout {known.rollout.hex()} of {model} is under way: let it end, or abort it")
    gone = state.withdrawn_versions
    newest = max((n for name, n in state.versions if name == model and (name, n) not in gone), default=0)
    if version is None and known is None and used is not None and used.version == newest:
        raise RefusedError(f"{model} version {newest} is the newest, and in use: publish another, or name --version")
    wanted = version if version is not None else known.version if known is not None else newest
    if (model, wanted) not in state.versions:
        raise UnknownError(f"{model[:64]!r} version {wanted} is not on the ledger: publish it first")
    if (model, wanted) in gone:
        raise RefusedError(f"{model} version {wanted} is withdrawn: {gone[model, wanted].reason}")
    if known is not None and known.version != wanted:
        raise RefusedError(f"{model} version {known.version} is held for its rollout: start or abort that first")
    if used is None:
        raise RefusedError(f"no version of {model} is in use to go back to: publish the next one with --serve")
    new = state.versions[model, wanted]
    mine, other = (_interface(state.releases[version.experts[0]]) for version in (new, used))
    if mine != other:
        raise RefusedError(
            f"{model} version {wanted} has {mine}, version {used.version} in use has {other}: clients would meet one or the"
            " other; publish it as another model, or with --serve"
        )
    return wanted


def _interface(expert: Release) -> str:
    """The names and types that clients have to know."""
    given, gives = (", ".join(f"{t[0]} {t[1]}" for t in tensors) for tensors in (expert.inputs, expert.outputs))
    return f"{given} -> {gives}"
