"""What a receipt proves: eight numbered checks over bytes alone, for a reader who trusts only a policy file.

1 parse strictly              5 statements carry the registrar's signature
2 checkpoint and cosignatures 6 outputs are signed by enrolled members and bound to their task
3 the leaf is in the tree     7 openings match commitments, stances are recomputed
4 so are its supports         8 the answer is the combination of its verdicts

What cannot be recomputed from one receipt (an agent's standing at that time) is named in `relied_on`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.answers import accepted_tensors, check_experts, check_result
from bmoe.ledger.rules.checkpoint import verify_cosignature
from bmoe.ledger.rules.combine import combine, unpack_choices
from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY, Answer, Rejected, Verdict, parse_entry
from bmoe.ledger.rules.merkle import leaf_hash, verify_inclusion
from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output, tolerances_of
from bmoe.ledger.rules.policies import policy_named
from bmoe.ledger.rules.policies.ballot import LETTERS, UNUSABLE
from bmoe.ledger.rules.receipt_format import Evidence, Receipt, format_receipt, merge_receipts, parse_receipt
from bmoe.ledger.rules.trust import Trust
from bmoe.ledger.rules.voting import Candidate, Tolerance, distance, stance
from bmoe.protocol.encoding import read_bstrs
from bmoe.protocol.errors import BmoeError, ConfigError, ProofError
from bmoe.protocol.messages import MAX_TENSORS, Member, ModelRelease, Output, Release, Sealed, open_message
from bmoe.protocol.tensors import Tensor

__all__ = ["Audited", "AuditedVerdict", "check_request", "format_receipt", "merge_receipts", "verify_receipt"]

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class AuditedVerdict:
    """One verdict as verified: (agent, owner, stance letter) for each output, and the value that it accepts.

    `referee` and `accepted_from` are member names or empty; `value` is None where openings are absent.
    """

    entry: Verdict
    index: int
    agents: tuple[tuple[str, str, str], ...]
    referee: str
    accepted_from: str
    value: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Audited:
    """What a receipt proved. `cosigned` are (validator, POSIX seconds); `result` is None unless it is of an answer.

    `recomputed` and `relied_on` say in words what was computed here and what rests on the validators' cosignatures.
    """

    kind: str
    entry: Verdict | Answer
    index: int
    size: int
    root: bytes
    cosigned: tuple[tuple[str, int], ...]
    verdicts: tuple[AuditedVerdict, ...]
    result: tuple[Tensor, ...] | None
    recomputed: tuple[str, ...]
    relied_on: tuple[str, ...]


@dataclass(frozen=True)
class _Statements:
    members: dict[str, Member]
    releases: dict[bytes, Release]
    models: tuple[ModelRelease, ...]


@dataclass(frozen=True)
class _Signed:
    """A verdict whose signatures are verified: its outputs in order, and the referee's or None."""

    entry: Verdict
    index: int
    outputs: tuple[Sealed[Output], ...]
    referee: Sealed[Output] | None


def verify_receipt(text: str | bytes, trust: Trust) -> Audited:
    """Verify a receipt against a trust policy; raises ProofError naming the step that fails and why."""
    with _step(1, "parse"):
        receipt = parse_receipt(text)
        evidence, checkpoint = receipt.evidence, receipt.checkpoint
        entry = _entry(evidence.leaf, trust, (Verdict, Answer))
    with _step(2, "checkpoint"):
        cosigned = check_cosignatures(receipt, trust)
    with _step(3, "inclusion"):
        verify_inclusion(receipt.index, checkpoint.size, leaf_hash(evidence.leaf), receipt.path, checkpoint.root)
    with _step(4, "supports"):
        verdicts = _supports(receipt, entry, trust)
    with _step(5, "statements"):
        statements = _statements(evidence, trust, verdicts)
    with _step(6, "signatures"):
        signed = [_signed(index, verdict, statements) for index, verdict in verdicts]
        _exactly({s.header.author for v in signed for s in _all(v)}, set(statements.members), "members' statements")
    with _step(7, "vote"):
        openings = _openings(evidence, entry, [v for _, v in verdicts])
        audited = tuple(_vote(v, statements, openings) for v in signed)
    with _step(8, "answer"):
        result = _answer(entry, audited, statements, openings)
    kind = "answer" if isinstance(entry, Answer) else "verdict"
    facts = (kind, entry, receipt.index, checkpoint.size, checkpoint.root, cosigned, audited, result)
    return Audited(*facts, *_scope(entry, audited, result))


def check_cosignatures(receipt: Receipt, trust: Trust) -> tuple[tuple[str, int], ...]:
    """(validator, POSIX seconds) of each trusted validator that cosigned; raises ProofError below the quorum.

    A line of a key that the policy does not name is ignored, as C2SP asks; one of a named key must verify.
    """
    if receipt.checkpoint.origin != trust.origin:
        raise ProofError(f"the checkpoint is of {receipt.checkpoint.origin!a}, the policy trusts {trust.origin!a}")
    present = {(s.name, s.key_id) for s in receipt.note.signatures}
    keys = [key for key in trust.validators if (key.name, key.key_id) in present]
    cosigned = tuple((key.name, verify_cosignature(receipt.note, key)) for key in keys)
    if len(cosigned) < trust.quorum:
        names = ", ".join(name for name, _ in cosigned) or "nobody"
        raise ProofError(f"a quorum of {trust.quorum} validators must have cosigned, found {len(cosigned)}: {names}")
    return cosigned


def check_request(entry: Answer, opening: bytes) -> None:
    """Raise ProofError unless `opening` (salt and input tensors, CBOR byte strings) is the request answered."""
    with _step(9, "request"):
        salt, *parts = read_bstrs(opening, 0, MAX_TENSORS + 1)
        rows = entry.rows
        tensors = [Tensor(str(i), "uint8", (rows, len(p) // rows), p) for i, p in enumerate(parts)]
        if commit_rows("", salt, tensors, rows) != entry.request_root:
            raise ProofError("this request is not the one that the answer commits to")


@contextlib.contextmanager
def _step(number: int, name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except BmoeError as error:
        raise ProofError(f"step {number} ({name}): {error}") from error
    except MALFORMED as error:
        raise ProofError(f"step {number} ({name}): malformed content ({type(error).__name__})") from error


def _entry(leaf: bytes, trust: Trust, kinds: tuple[type, ...]) -> Verdict | Answer:
    entry = parse_entry(leaf)
    if isinstance(entry, Rejected):
        raise ProofError(f"the leaf says that an entry by {entry.author} was rejected: {entry.reason}")
    if not isinstance(entry, kinds) or not isinstance(entry, (Verdict, Answer)):
        raise ProofError(f"expected a {' or '.join(k.__name__ for k in kinds)}, found {type(entry).__name__}")
    if (entry.ledger, entry.epoch) != (trust.ledger, trust.epoch):
        raise ProofError(
            f"the leaf is of ledger {entry.ledger.hex()}/{entry.epoch}, the policy trusts"
            f" {trust.ledger.hex()}/{trust.epoch}"
        )
    return entry


def _supports(receipt: Receipt, entry: Verdict | Answer, trust: Trust) -> list[tuple[int, Verdict]]:
    """The verdicts that the receipt is about: its own leaf, or those an answer names, in its order."""
    supports = receipt.evidence.supports
    if isinstance(entry, Verdict):
        if supports:
            raise ProofError(f"a verdict rests on no other leaf, {len(supports)} came")
        return [(receipt.index, entry)]
    found = []
    for support in supports:
        verdict = _entry(support.leaf, trust, (Verdict,))
        checkpoint = receipt.checkpoint
        verify_inclusion(support.index, checkpoint.size, leaf_hash(support.leaf), support.path, checkpoint.root)
        if support.index >= receipt.index:
            raise ProofError(f"the verdict at {support.index} was entered after the answer at {receipt.index}")
        assert isinstance(verdict, Verdict)
        found.append((support.index, verdict))
    if tuple(v.task for _, v in found) != entry.tasks:
        raise ProofError(f"the answer names {len(entry.tasks)} verdicts, the receipt's {len(found)} are not they")
    return found


def _statements(evidence: Evidence, trust: Trust, verdicts: Sequence[tuple[int, Verdict]]) -> _Statements:
    def read(cls: type, data: bytes) -> Member | Release | ModelRelease:
        sealed = open_message(cls, data)
        sealed.verify(trust.registrar)
        if sealed.header.ledger != trust.ledger:
            raise ProofError(f"a statement is of ledger {sealed.header.ledger.hex()}, not {trust.ledger.hex()}")
        return sealed.header

    members = [read(Member, data) for data in evidence.members]
    releases = [read(Release, data) for data in evidence.releases]
    models = tuple(read(ModelRelease, data) for data in evidence.models)
    by_name = {m.member: m for m in members}
    by_digest = {r.digest: r for r in releases}
    if len(by_name) != len(members) or len(by_digest) != len(releases):
        raise ProofError("a member or a release is stated twice")
    _exactly({v.expert for _, v in verdicts}, set(by_digest), "release statements")
    return _Statements(by_name, by_digest, models)


def _exactly(needed: set, given: set, what: str) -> None:
    if needed != given:
        raise ProofError(f"the {what} are not exactly those needed: {len(needed - given)} missing, "
                         f"{len(given - needed)} not asked for")  # fmt: skip


def _signed(index: int, verdict: Verdict, statements: _Statements) -> _Signed:
    binding = Binding(verdict.task, verdict.expert, verdict.input_root, verdict.rows)
    outputs = tuple(_verified(o, binding, statements, ("agent",)) for o in verdict.outputs)
    authors = [o.header.author for o in outputs]
    strangers = [a for a in authors if a not in verdict.assigned]
    if strangers or len(set(authors)) != len(authors):
        raise ProofError(f"task {verdict.task.hex()}: {', '.join(strangers) or 'an agent'} was not assigned, or twice")
    referee = None
    if verdict.referee:
        referee = _verified(verdict.referee, binding, statements, ("coordinator", "validator"))
    return _Signed(verdict, index, outputs, referee)


def _verified(envelope: bytes, binding: Binding, statements: _Statements, roles: tuple[str, ...]) -> Sealed[Output]:
    sealed = parse_output(envelope, binding)
    member = statements.members.get(sealed.header.author)
    if member is None:
        raise ProofError(f"the receipt has no registrar's statement about {sealed.header.author}")
    if member.role not in roles:
        raise ProofError(f"{member.member} is a {member.role}, not a {' or '.join(roles)}")
    sealed.verify(member.public_key)
    return sealed


def _all(signed: _Signed) -> tuple[Sealed[Output], ...]:
    return signed.outputs + ((signed.referee,) if signed.referee else ())


def _openings(evidence: Evidence, entry: Verdict | Answer, verdicts: Sequence[Verdict]) -> dict[bytes, bytes]:
    """Openings by digest: either none, or exactly those named."""
    digests = [hashlib.sha256(o).digest() for o in evidence.openings]
    if not digests:
        return {}
    named = {digest for v in verdicts for digest in v.openings}
    if isinstance(entry, Answer):
        named.add(entry.result_opening)
    if digests != sorted(named):
        raise ProofError(f"{len(named)} openings are named, the {len(digests)} given are not exactly they, in order")
    return dict(zip(digests, evidence.openings, strict=True))


def _vote(signed: _Signed, statements: _Statements, openings: dict[bytes, bytes]) -> AuditedVerdict:
    """Open every output of one verdict and judge it again by the accepted value."""
    entry = signed.entry
    sealed, accepted = _all(signed), _accepted_index(signed)
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
    return AuditedVerdict(entry, signed.index, agents, referee, chosen, value)


def _accepted_index(signed: _Signed) -> int | None:
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
        raise ProofError(f"task {entry.task.hex()}: stances are {stances!r}, the verdict states {entry.stances!r}")


def _answer(
    entry: Verdict | Answer, verdicts: Sequence[AuditedVerdict], statements: _Statements, openings: dict[bytes, bytes]
) -> tuple[Tensor, ...] | None:
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
    values = [
        accepted_tensors(openings, digest, release, v.entry.rows)
        for digest, release, v in zip(accepted, releases, verdicts, strict=True)
    ]
    result = combine(model.combine, choices, values, releases[0].batch)
    check_result(openings, entry, result)
    return result


def _accepted_opening(verdict: AuditedVerdict) -> bytes:
    entry = verdict.entry
    if not verdict.accepted_from:
        raise ProofError(f"task {entry.task.hex()} has no accepting verdict")
    return entry.openings[-1 if entry.accepted == BY_REFEREE else entry.accepted]


def _scope(
    entry: Verdict | Answer, verdicts: Sequence[AuditedVerdict], result: tuple[Tensor, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was recomputed here, and what rests on the validators' word."""
    recomputed = ["every output's signature, and that it is bound to its task, expert, input and rows"]
    relied_on = ["which agents were in service and trusted when the verdict was made, and so whether its policy held",
                 "that no other verdict for the task came first"]  # fmt: skip
    judged = [v for v in verdicts if v.value is not None]
    if judged:
        recomputed.append("every output's value opens its commitment, and its distance gives the stance stated")
    elif any(v.accepted_from for v in verdicts):
        relied_on.append("the outputs' values and stances: this receipt carries no openings")
    if result is not None:
        recomputed.append("the answer is the weighted combination of the accepted values, byte for byte")
    elif isinstance(entry, Answer):
        relied_on.append("the answer's combination: this receipt carries no openings")
    relied_on.append("that the expert computes these values: that takes a re-execution")
    return tuple(recomputed), tuple(relied_on)
