"""Rules for refutation: challenges, confirmations, complaints and equivocations. All are self-contained evidence.

Being outvoted is no evidence. An output is contradicted by a re-execution that differs by more than twice the
tolerance; it is refuted at the entry that completes a quorum of validators who re-executed it.
"""

from __future__ import annotations

from bmoe.ledger.rules.entries import Challenge, Claim, ComplaintEntry, Confirmation, Equivocation
from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output, tolerances_of
from bmoe.ledger.rules.standing import Act
from bmoe.ledger.rules.state import TASK_WINDOW_MS, Closed, Context, Event, FalseEntryError, State, made_at
from bmoe.ledger.rules.voting import NEUTRAL, distance
from bmoe.protocol.errors import InputError, MessageError, RefusedError
from bmoe.protocol.messages import Complaint, Output, Sealed, Task, open_message


def challenge(state: State, context: Context, entry: Challenge) -> list[Event]:
    """A validator claims that outputs of a closed task are wrong."""
    targets = _contradicted(state, context, entry)
    fresh = [t for t in targets if (entry.task, t) not in state.claims]
    for target in fresh:
        state.claims[(entry.task, target)] = set()
    events = [Event("challenge", {"task": entry.task, "targets": tuple(targets), "validator": entry.author})]
    return events + _support(state, entry, targets)


def confirmation(state: State, context: Context, entry: Confirmation) -> list[Event]:
    """A validator re-executed what a referee or another validator claims, and agrees."""
    targets = _contradicted(state, context, entry)
    unclaimed = [t for t in targets if (entry.task, t) not in state.claims]
    if unclaimed:
        raise RefusedError(f"nobody claims that {', '.join(unclaimed)} was wrong on task {entry.task.hex()}")
    events = [Event("confirmation", {"task": entry.task, "targets": tuple(targets), "validator": entry.author})]
    return events + _support(state, entry, targets)


def _support(state: State, entry: Claim, targets: list[str]) -> list[Event]:
    events: list[Event] = []
    for target in targets:
        supporters = state.claims[(entry.task, target)]
        already = len(supporters) >= state.quorum
        supporters.add(entry.author)
        if already or len(supporters) < state.quorum:
            continue
        events.append(Event("refuted", {"task": entry.task, "member": target}))
        events += state.act(target, Act.REFUTED)
        if target not in state.agents:
            state.refuted.add(target)
    return events


def _contradicted(state: State, context: Context, entry: Claim) -> list[str]:
    """The authors of the targets, each proven to differ from the validator's own output by more than NEUTRAL."""
    if state.role_of(entry.author) != "validator":
        raise RefusedError(f"only a validator may claim, not {entry.author}")
    closed = state.closed.get(entry.task)
    if closed is None:
        raise RefusedError(f"task {entry.task.hex()} has no verdict that can still be challenged")
    if not entry.targets or len(entry.targets) != len(entry.target_openings):
        raise MessageError("a claim names outputs, each with its opening")
    own = _signed(state, entry.output, closed.binding)
    if own.header.author != entry.author:
        raise RefusedError(f"{entry.author} claims with {own.header.author}'s output")
    targets = [_signed(state, t, closed.binding) for t in entry.targets]
    names = [t.header.author for t in targets]
    if len(set(names)) != len(names) or entry.author in names:
        raise MessageError("a claim names each output once, and never the claimant's own")
    # A claim carries its evidence, so that even those who do not recompute verdicts check it: it moves standing.
    if context.recompute or {entry.opening, *entry.target_openings} <= context.attachments.keys():
        _check_distances(state, context.attachments, entry, closed, own, targets)
    return names


def _check_distances(
    state: State,
    attachments: dict[bytes, bytes],
    entry: Claim,
    closed: Closed,
    own: Sealed[Output],
    targets: list[Sealed[Output]],
) -> None:
    release = state.releases[closed.binding.expert]
    tolerances = tolerances_of(release)
    try:
        mine = candidate_of(own.header, open_output(own.header, attachments[entry.opening]), release)
        if mine is None:
            raise MessageError("the claimant's own value is unusable")
        for target, digest in zip(targets, entry.target_openings, strict=True):
            theirs = candidate_of(target.header, open_output(target.header, attachments[digest]), release)
            if theirs is not None and distance(mine, theirs, tolerances) <= NEUTRAL:
                raise MessageError(f"{target.header.author}'s output does not differ by more than {NEUTRAL} tolerances")
    except KeyError as missing:
        raise FalseEntryError("an opening is not attached") from missing
    except InputError as error:
        raise FalseEntryError(str(error)) from error


def _signed(state: State, envelope: bytes, binding: Binding) -> Sealed[Output]:
    sealed = parse_output(envelope, binding)
    state.verify(sealed)
    return sealed


def equivocation(state: State, context: Context, entry: Equivocation) -> list[Event]:
    """Two different outputs for one task, both signed: the agent is out at once, whoever brings them."""
    first, second = open_message(Output, entry.first), open_message(Output, entry.second)
    a, b = first.header, second.header
    if (a.author, a.task) != (b.author, b.task):
        raise MessageError("an equivocation is two outputs of one agent for one task")
    if a.author not in state.agents:
        raise RefusedError(f"{a.author} is not an enrolled agent")
    if first.envelope.payload == second.envelope.payload:
        raise MessageError("the two outputs are the same")
    for sealed in (first, second):
        state.verify(sealed)
    events = state.act(a.author, Act.EQUIVOCATED)
    return [Event("equivocation", {"agent": a.author, "task": a.task}), *events]


def complaint(state: State, context: Context, entry: ComplaintEntry) -> list[Event]:
    """An agent's complaint, entered by the validator that it reached, which then re-executes the task."""
    if state.role_of(entry.author) != "validator":
        raise RefusedError(f"only a validator may enter a complaint, not {entry.author}")
    sealed, task, _ = read_complaint(state, entry)
    agent, key = sealed.header.author, (task.header.task, sealed.header.author)
    if key in state.complaints:
        raise RefusedError(f"{agent} has complained of task {task.header.task.hex()} already")
    if made_at(task.header.task) + TASK_WINDOW_MS < state.time_ms:
        raise RefusedError(f"task {task.header.task.hex()} is too old to complain of")
    state.complaints.add(key)
    return [Event("complaint", {"agent": agent, "task": task.header.task, "reason": sealed.header.reason})]


def read_complaint(state: State, entry: ComplaintEntry) -> tuple[Sealed[Complaint], Sealed[Task], Sealed[Output]]:
    """The three statements of a complaint, verified and bound to each other; raises InputError or RefusedError."""
    sealed, task = open_message(Complaint, entry.complaint), open_message(Task, entry.task)
    agent = sealed.header.author
    state.verify(sealed)
    if state.role_of(task.header.author) != "coordinator":
        raise RefusedError(f"the task complained of is signed by {task.header.author}, not a coordinator")
    state.verify(task)
    t = task.header
    output = _signed(state, entry.output, Binding(t.task, t.expert, t.input_root, t.rows))
    if (t.agent, output.header.author, sealed.header.task) != (agent, agent, t.task):
        raise RefusedError(f"the complaint of {agent} is not about a task that it was given and answered")
    return sealed, task, output
