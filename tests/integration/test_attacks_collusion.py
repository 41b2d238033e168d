"""Agents that agree on a lie: found out by re-execution, however many they are; outvoting proves nothing."""

from __future__ import annotations

import time

import pytest
from live_fleet import LiveFleet

from benchmarks.fleet import AgentSpec
from benchmarks.processes import tail
from bmoe.ledger.rules.entries import Verdict
from bmoe.ledger.rules.standing import Standing
from bmoe.protocol.messages import Output, open_message

pytestmark = pytest.mark.asyncio(loop_scope="session")

CAUGHT_WITHIN_S = 60.0


def colluders(name: str, count: int) -> list[AgentSpec]:
    """Agents of different owners that all tell the same lie."""
    return [AgentSpec(f"{name}-{i}", f"{name}-owner-{i}", "collude", ("--seed", "3")) for i in range(1, count + 1)]


async def ask_until_caught(fleet: LiveFleet, liars: list[AgentSpec]) -> None:
    """Ask with the default policy until every liar is out of service; all answers on the way are right."""
    deadline = time.monotonic() + CAUGHT_WITHIN_S
    while True:
        await fleet.answers_right()
        standings = {liar.name: await fleet.standing_of(liar.name) for liar in liars}
        if set(standings.values()) <= {"quarantined", "revoked"}:
            return
        words = tail(fleet.layout.logs() / "validator-1.log")
        assert time.monotonic() < deadline, f"after {CAUGHT_WITHIN_S:g} s the liars are {standings}\n{words}"


async def test_two_of_six_that_collude_are_put_out_of_service_and_no_answer_is_wrong(fleet: LiveFleet) -> None:
    liars = colluders("pair", 2)
    async with fleet.agents(*liars):
        await ask_until_caught(fleet, liars)
        for liar in liars:
            await fleet.logged("coordinator", "output_contradicted", agent=liar.name)
            await fleet.logged("coordinator", "refuted", member=liar.name)
        facts = await fleet.unharmed()
    for liar in liars:
        assert facts.outputs_of(liar.name), "what convicts it stands on the ledger, signed by itself"
        assert facts.state.standing(liar.name) in (Standing.QUARANTINED, Standing.REVOKED)
        assert facts.state.agents[liar.name].refutations >= 1


async def test_a_colluding_majority_outvotes_the_honest_and_yet_the_referee_answers_right(fleet: LiveFleet) -> None:
    """Five of nine lie alike: beyond the 50 % that the vote of all, the paper's scheme, can bear."""
    liars = colluders("gang", 5)
    async with fleet.agents(*liars):
        outvoted = await fleet.ask("full")
        assert not fleet.is_right(outvoted), "nobody was outvoted: this shows nothing"
        await ask_until_caught(fleet, liars)
        facts = await fleet.unharmed()  # the vote of all is right again: nobody who lies has one
    verdicts = [facts.verdicts[bytes.fromhex(task)] for task in outvoted.verdicts]
    # The outvoted complain, and the validator may have caught all liars before the request's last vote is counted.
    false = [v for v in verdicts if accepted_author(v) in {liar.name for liar in liars}]
    assert false
    for verdict in false:
        assert verdict.policy == "full" and set(fleet.honest) <= set(verdict.assigned)
        assert any((verdict.task, name) in facts.state.complaints for name in fleet.honest)


def accepted_author(verdict: Verdict) -> str:
    """Whose output a verdict of the agents' own accepted."""
    return open_message(Output, verdict.outputs[verdict.accepted]).header.author
