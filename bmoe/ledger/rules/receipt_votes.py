"""Steps 6 to 8 of a receipt's verification: signatures and bindings, values and stances, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.answers import check_experts, check_result
from bmoe.ledger.rules.combine import combine, unpack_choices
from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY, Answer, Verdict
from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output, tolerances_of
from bmoe.ledger.rules.policies import policy_named
from bmoe.ledger.rules.policies.ballot import LETTERS, UNUSABLE
from bmoe.ledger.rules.voting import Candidate, Tolerance, distance, stance
from bmoe.protocol.errors import ProofError
from bmoe.protocol.messages import Member, ModelRelease, Output, Release, Sealed
from bmoe.protocol.tensors import Tensor


@dataclass(frozen=True)
class AuditedVerdict:
    """One verdict as verified: (agent, owner, stance letter) for each output, and the value that it accepts.

    `providers`: on which execution provider each of those agents says, signed, to have computed.
    `referee` and `accepted_from` are member names or empty; `value` is None where openings are absent.
    """

    entry: Verdict
    index: int
    agents: tuple[tuple[str, str, str], ...]
    referee: str
    accepted_from: str
    value: tuple[Tensor, ...] | None
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statements:
    """The signed statements a receipt carries: members by name, releases by expert digest, and models."""

    members: dict[str, Member]
    releases: dict[bytes, Release]
    models: tuple[ModelRelease, ...]


@dataclass(frozen=True)
class SignedVerdict:
    """A verdict whose signatures are verified: its outputs in order, and the referee's or None."""

    entry: Verdict
    index: int
    outputs: tuple[Sealed[Output], ...]
    referee: Sealed[Output] | None


def check_signatures(index: int, verdict: Verdict, statements: Statements) -> SignedVerdict:
    """The verdict's outputs, each verified and bound to its task; raises ProofError, naming what is wrong."""
    binding = Binding(verdict.task, verdict.expert, verdict.input_root, verdict.rows)
    outputs = tuple(_verified(o, binding, statements, ("agent",)) for o in verdict.outputs)
    authors = [o.header.author for o in outputs]
    strangers = [a for a in authors if a not in verdict.assigned]
    if strangers or len(set(authors)) != len(authors):
        raise ProofError(f"task {verdict.task.hex()}: {', '.join(strangers) or 'an agent'} was not assigned, or twice")
    referee = None
    if verdict.referee:
        referee = _verified(verdict.referee, binding, statements, ("coordinator", "validator"))
    return SignedVerdict(verdict, index, outputs, referee)


def _verified(envelope: bytes, binding: Binding, statements: Statements, roles: tuple[str, ...]) -> Sealed[Output]:
    sealed = parse_output(envelope, binding)
    member = statements.members.get(sealed.header.author)
    if member is None:
        raise ProofError(f"the receipt has no registrar's statement about {sealed.header.author}")
    if member.role not in roles:
        raise ProofError(f"{member.member} is a {member.role}, not a {' or '.join(roles)}")
    sealed.verify(member.public_key)
    return sealed


def all_outputs(signed: SignedVerdict) -> tuple[Sealed[Output], ...]:
    """Every output of the verdict, its referee's last."""
    return signed.outputs + ((signed.referee,) if signed.referee else ())


def check_vote(signed: SignedVerdict, statements: Statements, openings: dict[bytes, bytes]) -> AuditedVerdict:
    """Open every output of one verdict and judge it again by the accepted value."""
    entry = signed.entry
    sealed, accepted = all_outputs(signed), _accepted_index(signed)
    if len(entry.stances) != len(entry.outputs) or len(entry.openings) != len(sealed):
        raise ProofError("a verdict has one stance and one opening for each output")
    value = None
    if openings:
        release = statements.releases[entry.expert]
        opened = [open_output(s.header, openings[d]) for s, d in zip(sealed, entry.openings, strict=True)]
        if accepted is not None:
            candidates = [candidate_of(s.header, t, release) for s, t in zip(sealed, opened, strict=True)]
            _check_stances(entry, candidates, accepted, tolerances_of(release))
            value = opened[accepted]
    owners = [statements.members[s.header.author].owner for s in signed.outputs]
    agents = tuple((s.header.author, o, c) for s, o, c in zip(signed.outputs, owners, entry.stances, strict=True))
    referee = signed.referee.header.author if signed.referee else ""
    chosen = sealed[accepted].header.author if accepted is not None else ""
    providers = tuple(s.header.provider for s in signed.outputs)
    return AuditedVerdict(entry, signed.index, agents, referee, chosen, value, providers)


def _accepted_index(signed: SignedVerdict) -> int | None:
    """Where the accepted value stands among outputs and then the referee's; None where nothing is accepted."""
    entry = signed.entry
    policy_named(entry.policy, entry.policy_version)
    if entry.outcome != "accepted":
        if entry.accepted != NOBODY:
            raise ProofError(f"the verdict is {entry.outcome} and yet accepts a value")
        return None
    if entry.accepted == BY_REFEREE and signed.referee:
        return len(signed.outputs)
    if signed.referee and entry.policy in ("referee", "diagnosis"):
        raise ProofError(f"policy {entry.policy} accepts its referee's value, the verdict accepts another")
    if entry.accepted >= len(signed.outputs):
        raise ProofError(f"the verdict accepts output {entry.accepted} of {len(signed.outputs)}")
    return entry.accepted


def _check_stances(
    entry: Verdict, candidates: Sequence[Candidate | None], accepted: int, tolerances: tuple[Tolerance, ...]
) -> None:
    value = candidates[accepted]
    if value is None:
        raise ProofError("the accepted value is not one that the release allows")
    outputs = candidates[: len(entry.outputs)]
    stances = "".join(UNUSABLE if c is None else LETTERS[stance(distance(value, c, tolerances))] for c in outputs)
    if stances != entry.stances:
        raise ProofError(f"task {entry.task.hex()}: stances are {stances!a}, the verdict states {entry.stances!a}")


def check_answer(
    entry: Verdict | Answer, verdicts: Sequence[AuditedVerdict], statements: Statements, openings: dict[bytes, bytes]
) -> tuple[Tensor, ...] | None:
    """The answer's value recombined from its verdicts' openings; None for a verdict's receipt, or without openings.

    Raises ProofError or MessageError when the receipt holds what it does not need, or the combination is another.
    """
    if isinstance(entry, Verdict):
        if statements.models:
            raise ProofError("a verdict needs no statement about a model")
        return None
    if len(statements.models) != 1:
        raise ProofError(f"an answer needs one statement about its model, {len(statements.models)} came")
    model = statements.models[0]
    if (model.model, model.version, model.gate) != (entry.model, entry.version, entry.gate):
        raise ProofError(f"the statement is about {model.model} {model.version}, not {entry.model} {entry.version}")
    choices = unpack_choices(entry.rows, entry.top_k, entry.experts, entry.weights, entry.task_index, entry.task_rows)
    releases = [statements.releases[v.entry.expert] for v in verdicts]
    check_experts(model, entry, choices.experts.tolist(), choices.task_index.tolist(), releases)
    accepted = tuple(_accepted_opening(v) for v in verdicts)
    if accepted != entry.openings:
        raise ProofError("the answer rests on values that its verdicts did not accept")
    if not openings:
        return None
    values = [v.value for v in verdicts if v.value is not None]  # all of them: each accepts, and openings are there
    result = combine(model.combine, choices, values, releases[0].batch)
    check_result(openings, entry, result)
    return result


def _accepted_opening(verdict: AuditedVerdict) -> bytes:
    entry = verdict.entry
    if not verdict.accepted_from:
        raise ProofError(f"task {entry.task.hex()} has no accepting verdict")
    return entry.openings[-1 if entry.accepted == BY_REFEREE else entry.accepted]
