"""Rules for tasks opened and verdicts: every claim of a verdict is recomputed from the signed outputs."""

from __future__ import annotations

from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY, Opened, Verdict
from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output, tolerances_of
from bmoe.ledger.rules.policies import Ballot, Decision, Vote, policy_named, verifies
from bmoe.ledger.rules.policies.ballot import IGNORED, UNUSABLE
from bmoe.ledger.rules.releases import check_not_withdrawn
from bmoe.ledger.rules.standing import Act, Standing
from bmoe.ledger.rules.state import (
    AHEAD_MAX_MS,
    AS_OF_SLACK,
    TASK_WINDOW_MS,
    Closed,
    Context,
    Event,
    FalseEntryError,
    Slot,
    State,
    made_at,
)
from bmoe.ledger.rules.voting import Candidate
from bmoe.protocol.errors import InputError, MessageError, RefusedError
from bmoe.protocol.messages import MAX_ROWS, Output, Release

OPEN_MAX = 65_536


def opened(state: State, context: Context, entry: Opened) -> list[Event]:
    """Open slots. A task id begins with its time (ms, 6 bytes), so that an id can never be opened twice."""
    _coordinator(state, entry.author)
    if len(state.open) + len(entry.tasks) > OPEN_MAX:
        raise RefusedError(f"{len(state.open)} tasks are open, the limit is {OPEN_MAX}: close some first")
    for task, expert, rows in entry.tasks:
        if not 1 <= rows <= MAX_ROWS:
            raise RefusedError(f"task {task.hex()} has {rows} rows, 1..{MAX_ROWS} are possible")
        check_made(state, task, entry.time_ms)
        if task in state.open or task in state.closed:
            raise RefusedError(f"task {task.hex()} is opened twice")
        if expert not in state.releases:
            raise RefusedError(f"expert {expert.hex()[:16]} has no release")
        check_not_withdrawn(state, expert)
    if len({t[0] for t in entry.tasks}) != len(entry.tasks):
        raise RefusedError("a task is opened twice in one entry")
    for task, expert, rows in entry.tasks:
        state.open[task] = Slot(expert, rows, state.size)
    return [Event("opened", {"tasks": tuple(t[0] for t in entry.tasks)})]


def check_made(state: State, task: bytes, time_ms: int) -> None:
    """Raise RefusedError unless an entry written at `time_ms` may open a task of this id."""
    made_ms = made_at(task)
    if abs(made_ms - time_ms) > TASK_WINDOW_MS // 2 or made_ms < state.time_ms - TASK_WINDOW_MS // 2:
        raise RefusedError(f"task {task.hex()} was not made within 10 minutes of its entry")
    if state.time_ms and made_ms > state.time_ms + AHEAD_MAX_MS:
        raise RefusedError(f"task {task.hex()} is dated more than 30 days ahead of the ledger's time")


def verdict(state: State, context: Context, entry: Verdict) -> list[Event]:
    """Close a task with what its outputs prove. The first verdict for a task wins."""
    # 1. The author may judge, and the slot is open for this expert and batch.
    _coordinator(state, entry.author)
    slot = state.open.get(entry.task)
    if slot is None:
        raise RefusedError(f"task {entry.task.hex()} is not open: it was never opened, or has its verdict")
    if (slot.expert, slot.rows) != (entry.expert, entry.rows):
        raise RefusedError(f"task {entry.task.hex()} was opened for another expert or batch")
    # 2. Standing is read as of a size that author and readers have both seen, while the task was open; the slack is
    # for an author that had not yet read its own latest frames back.
    if not slot.size - AS_OF_SLACK <= entry.as_of <= state.size:
        raise RefusedError(f"as_of {entry.as_of} is not a size of this ledger ({state.size}) while the task was open")
    if entry.referee and state.refuted:
        referee = parse_output(entry.referee, Binding(entry.task, entry.expert, entry.input_root, entry.rows)).header
        if referee.author in state.refuted:
            raise RefusedError(f"{referee.author} was refuted and can be no referee any more")
    release = state.releases[entry.expert]
    if len(entry.stances) != len(entry.outputs) or len(entry.openings) != len(entry.outputs) + bool(entry.referee):
        raise MessageError("a verdict has one stance and one opening for each output")
    by_referee = entry.accepted == BY_REFEREE and bool(entry.referee)
    if entry.outcome == "accepted" and not (by_referee or entry.accepted < len(entry.outputs)):
        raise MessageError("an accepting verdict accepts one of its outputs, or its referee's")
    # 3.-5. Signatures, bindings, openings, and the policy's decision.
    if context.recompute and entry.outcome == "accepted":
        decision = decide_again(state, context.attachments, entry, release)
        if (decision.accepted, decision.stances) != (entry.accepted, entry.stances):
            raise FalseEntryError(
                f"verdict on {entry.task.hex()}: {entry.policy} accepts {decision.accepted} with stances "
                f"{decision.stances!a}, the entry claims {entry.accepted} with {entry.stances!a}"
            )
    elif entry.outcome != "accepted" and (entry.accepted != NOBODY or set(entry.stances) - {IGNORED}):
        raise FalseEntryError(f"verdict on {entry.task.hex()} is {entry.outcome} and yet accepts or judges a value")
    headers = _headers(entry)
    del state.open[entry.task]
    return _close(state, entry, headers)


def decide_again(state: State, attachments: dict[bytes, bytes], entry: Verdict, release: Release) -> Decision:
    """The policy's decision over the outputs that the verdict carries; raises InputError for any that may not count."""
    binding = Binding(entry.task, entry.expert, entry.input_root, entry.rows)
    votes = []
    for envelope, digest in zip(entry.outputs, entry.openings, strict=False):
        agent, candidate = _signed_value(state, attachments, envelope, digest, binding, release, ("agent",))
        if agent not in entry.assigned:
            raise FalseEntryError(f"{agent} was not assigned task {entry.task.hex()}")
        votes.append(Vote(agent, state.members[agent].owner, state.standing(agent, entry.as_of), candidate))
    if len({v.agent for v in votes}) != len(votes):
        raise FalseEntryError("an agent is counted twice")
    referee = None
    if entry.referee:
        roles = ("coordinator", "validator")
        _, referee = _signed_value(state, attachments, entry.referee, entry.openings[-1], binding, release, roles)
        if referee is None:
            raise FalseEntryError("the referee's own value is unusable")
    ballot = Ballot(tuple(votes), referee, len(entry.assigned), tolerances_of(release), closed=True)
    return policy_named(entry.policy, entry.policy_version).decide(ballot)


def _signed_value(
    state: State,
    attachments: dict[bytes, bytes],
    envelope: bytes,
    digest: bytes,
    binding: Binding,
    release: Release,
    roles: tuple[str, ...],
) -> tuple[str, Candidate | None]:
    try:
        sealed = parse_output(envelope, binding)
        author = sealed.header.author
        state.verify(sealed)
        if state.role_of(author) not in roles:
            raise RefusedError(f"{author} is a {state.role_of(author)}, not a {' or '.join(roles)}")
        if digest not in attachments:
            raise MessageError(f"the opening {digest.hex()[:16]} of {author}'s output is not attached")
        tensors = open_output(sealed.header, attachments[digest])
    except (InputError, RefusedError) as error:
        raise FalseEntryError(f"task {binding.task.hex()}: {error}") from error
    return author, candidate_of(sealed.header, tensors, release)


def _headers(entry: Verdict) -> list[Output]:
    """What the outputs say, and behind them the referee's where its value is the one accepted."""
    binding = Binding(entry.task, entry.expert, entry.input_root, entry.rows)
    last = (entry.referee,) if entry.accepted == BY_REFEREE else ()
    return [parse_output(o, binding).header for o in (*entry.outputs, *last)]


def _close(state: State, entry: Verdict, headers: list[Output]) -> list[Event]:
    authors = [header.author for header in headers[: len(entry.outputs)]]
    accepts = entry.outcome == "accepted"
    index = len(entry.outputs) if entry.accepted == BY_REFEREE else entry.accepted
    suspects = tuple(a for a, s in zip(authors, entry.stances, strict=True) if s in "d" + UNUSABLE)
    # A referee's output that the policy did not ask for is no re-execution: the value accepted is not its own.
    by_referee = entry.accepted == BY_REFEREE
    contradicted = suspects if by_referee else ()
    state.closed[entry.task] = Closed(
        binding=Binding(entry.task, entry.expert, entry.input_root, entry.rows),
        index=state.size,
        expires_ms=max(state.time_ms, made_at(entry.task)) + TASK_WINDOW_MS,
        author=entry.author,
        outcome=entry.outcome,
        policy=entry.policy,
        opening=entry.openings[index] if accepts else b"",
        specs=headers[index].outputs if accepts else (),
        outputs=dict(zip(authors, entry.stances, strict=True)),
        reexecuted=by_referee,
        suspects=contradicted,
        tenant=entry.tenant,
    )
    for agent in contradicted:
        state.claims.setdefault((entry.task, agent), set())
    events = [Event("verdict", {"entry": entry, "index": state.size, "contradicted": contradicted})]
    return events + _credit(state, entry, authors)


def _credit(state: State, entry: Verdict, authors: list[str]) -> list[Event]:
    """An output agreed with a re-execution, or with a trusted agent's of another owner: that is a clean one."""
    if entry.outcome != "accepted" or not verifies(entry.policy):
        return []
    if entry.policy == "diagnosis":
        letters = zip(authors, entry.stances, strict=True)
        acts = {"a": Act.DIAGNOSED, "d": Act.MISDIAGNOSED, UNUSABLE: Act.MISDIAGNOSED}
        return [event for agent, s in letters if s in acts for event in state.act(agent, acts[s])]
    agreeing = [a for a, s in zip(authors, entry.stances, strict=True) if s == "a"]
    trusted = {a for a in agreeing if state.standing(a, entry.as_of) is Standing.TRUSTED}
    events: list[Event] = []
    for agent in agreeing:
        owner = state.members[agent].owner
        backed = entry.accepted == BY_REFEREE or any(state.members[t].owner != owner for t in trusted - {agent})
        if backed:
            events += state.act(agent, Act.CLEAN)
    return events


def _coordinator(state: State, author: str) -> None:
    if state.role_of(author) != "coordinator":
        raise RefusedError(f"only a coordinator may enter this, not {author}")
