"""What every refused attack on the rules is held to: one rejected leaf, nothing else moved, and others carry on."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ledger_fixtures import Fleet, Kind, OpenTask, Signed, inputs_for, toy

from bmoe.ledger.rules.entries import BY_REFEREE, Rejected, parse_entry
from bmoe.ledger.rules.fold import Applied, apply_message
from bmoe.ledger.rules.state import State
from bmoe.protocol.messages import Output, open_message, seal_header


def memory(state: State) -> dict[str, Any]:
    """A copy of all that the state remembers apart from its size and the authors' chains."""
    return copy.deepcopy({k: v for k, v in vars(state).items() if k not in ("size", "authors")})


def one_rejected(applied: Applied, author: str, reason: str) -> Rejected:
    """The one leaf that something refused became: it names its author and why."""
    assert len(applied.leaves) == 1, applied.events
    leaf = parse_entry(applied.leaves[0])
    assert isinstance(leaf, Rejected), applied.events
    assert leaf.author == author
    assert re.search(reason, leaf.reason), leaf.reason
    assert [e.kind for e in applied.events] == ["rejected"]
    return leaf


def refused(
    fleet: Fleet, author: str, kind: Kind, reason: str, *, attached: Sequence[bytes] = (), fences: bool = False
) -> None:
    """Enter one bad entry: one rejected leaf, all else as it was, its author fenced or not, and others carry on."""
    before, size = memory(fleet.state), fleet.state.size
    one_rejected(fleet.enter(author, kind, attachments=attached), author, reason)
    assert memory(fleet.state) == before
    assert fleet.state.size == size + 1
    assert bool(fleet.state.authors[author].fenced) is fences, fleet.state.authors[author].fenced
    carries_on(fleet, author)


def frame_refused(fleet: Fleet, data: bytes, reason: str, author: str = "unknown") -> None:
    """Fold one bad frame that is refused whole."""
    before, size = memory(fleet.state), fleet.state.size
    chains = {a: (s.seq, s.previous) for a, s in fleet.state.authors.items()}
    one_rejected(apply_message(fleet.state, data), author, reason)
    assert memory(fleet.state) == before
    assert fleet.state.size == size + 1
    assert {a: (fleet.state.authors[a].seq, fleet.state.authors[a].previous) for a in chains} == chains


def carries_on(fleet: Fleet, author: str) -> None:
    """An honest entry by somebody else counts."""
    if author == "registrar":
        assert fleet.enter("coordinator", fleet.opened(inputs_for(1))[1]).events[0].kind == "opened"
    else:
        assert fleet.enter("registrar", fleet.member("coordinator", "coordinator")).events[0].kind == "member"


def founded(agents: int = 5, validators: int = 1) -> Fleet:
    """A fleet with genesis, members and releases entered."""
    fleet = Fleet(agent_count=agents, validator_count=validators)
    fleet.found()
    return fleet


def kinds(applied: Applied) -> list[str]:
    """What a frame brought about."""
    return [event.kind for event in applied.events]


def agreed(fleet: Fleet, agents: Sequence[str] = ("agent-1", "agent-2", "agent-3")) -> tuple[OpenTask, list[Signed]]:
    """A task opened, and the honest outputs of these agents."""
    task = fleet.open_task()
    return task, [fleet.output(a, task) for a in agents]


def openings(outputs: Sequence[Signed]) -> list[bytes]:
    """The attachments that open these outputs."""
    return [o.opening for o in outputs]


def resigned(fleet: Fleet, signed: Signed, by: str = "", **changes: Any) -> Signed:
    """The same output with fields of its header changed, signed again by its author, or by another in its name."""
    header = dataclasses.replace(open_message(Output, signed.envelope).header, **changes)
    envelope = seal_header(fleet.signers[by or signed.author], header)
    return dataclasses.replace(signed, author=header.author, envelope=envelope)


def referee_decides(
    fleet: Fleet, agents: Sequence[str], lie: Signed | None = None, task: OpenTask | None = None, **options: Any
) -> tuple[OpenTask, Signed, Applied]:
    """A verdict by the coordinator's own re-execution over these agents' honest outputs (and a lie, when given)."""
    task = task or fleet.open_task()
    referee = fleet.output("coordinator", task)
    outputs = [*([lie] if lie else []), *[fleet.output(a, task) for a in agents]]
    options = {"policy": "referee", "accepted": BY_REFEREE, "referee": referee, **options}
    return task, referee, fleet.decide(task, outputs, **options)


def refute(fleet: Fleet, agent: str) -> OpenTask:
    """One agent lies, and a quorum of validators re-executes and says so."""
    task = fleet.open_task()
    lie = fleet.output(agent, task, toy(task.x) + 1)
    assert kinds(referee_decides(fleet, [], lie, task)[2]) == ["verdict"]
    for name in fleet.validators[: fleet.state.quorum]:
        applied = fleet.challenge(task, fleet.output(name, task), [lie])
    assert "refuted" in kinds(applied)
    return task
