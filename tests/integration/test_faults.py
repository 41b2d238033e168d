"""Sudden deaths under load, on a fleet of real processes: what clients see meanwhile, and what the ledger says after.

One fleet for all tests of this file. Each hurts one process while clients keep asking, and ends with a reader that
folds the whole ledger again (ledger_check): a fault that leaves a trace there fails the test that comes next as well.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Collection
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio
from fault_tools import Gateway, Load, end_of, gateway_pid, kill_in_gateway, until
from kills import Kills, killable
from ledger_check import check_ledger

from benchmarks.fleet import GATEWAY, AgentSpec, LocalFleet, specs
from benchmarks.processes import descendants
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.ledger.stream import ACK_TIMEOUT_S
from bmoe.protocol.messages import MAX_TENSORS, Output, open_message
from coordinator.embedded.ports import read_ports
from coordinator.state_layout import StateLayout

pytestmark = pytest.mark.asyncio(loop_scope="module")
TASK_TIMEOUT_S = 3.0
IN_SERVICE = ("probation", "trusted")
BACK_WITHIN_S = 45.0
ORDER = "kill-at"
STAGES = (
    "accepted", "opened", "dispatching", "output received", "decided", "verdict submitted", "answer submitted",
    "promised", "answer on the ledger",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalFleet]:
    root = tmp_path_factory.mktemp("faults")
    async with LocalFleet(root, specs(3), environment=killable(root / ORDER)) as fleet:
        (fleet.state / "gateway.toml").write_text(f"task_timeout_ms = {int(TASK_TIMEOUT_S * 1000)}\n")
        await fleet.start()
        async with Load(fleet) as load:  # until latencies are known, every hedge waits a second
            await load.more(20, BACK_WITHIN_S)
        yield fleet


async def test_a_killed_coordinator_loses_nothing_committed_and_commits_nothing_twice(fleet: LocalFleet) -> None:
    async with Load(fleet, clients=4) as load:
        await load.more(6, BACK_WITHIN_S)
        await kill_in_gateway(fleet, "coordinator", load.flying(2))
        await load.more(4, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    assert any(call.error is not None for call in load.calls), "the fault hit nobody: nothing was shown"


async def test_a_coordinator_killed_at_any_stage_loses_no_request_and_judges_no_task_twice(fleet: LocalFleet) -> None:
    kills = Kills(fleet, fleet.root / ORDER)
    for stage in STAGES:
        await kills.at(stage)
    facts = await check_ledger(fleet.state)
    kills.check(facts)
    assert facts.opened.keys() == facts.verdicts.keys()
    known = [one for one in kills.asked if one.outcome is not None]
    assert len(known) > len(STAGES), "hardly any request was accepted: nothing was shown"


async def test_a_promise_is_kept_though_the_ledger_had_nothing_of_it_when_the_coordinator_died(
    fleet: LocalFleet,
) -> None:
    kills = Kills(fleet, fleet.root / ORDER)
    asked = await kills.at("held", ("decided",))
    assert all(one.told is not None and one.told["parameters"]["stage"] == "decided" for one in asked)
    kills.check(await check_ledger(fleet.state))


async def test_tasks_that_a_killed_coordinator_left_open_are_closed_as_abandoned(fleet: LocalFleet) -> None:
    agents = [fleet.pids()[spec.name] for spec in fleet.agents]
    async with Load(fleet) as load:
        for pid in agents:
            os.kill(pid, signal.SIGSTOP)  # so that tasks stay open, and their outputs come to the next coordinator
        try:
            await until(lambda: _running(fleet), 5, "tasks in work")
            await kill_in_gateway(fleet, "coordinator")
        finally:
            for pid in agents:
                os.kill(pid, signal.SIGCONT)
        await load.more(4, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    assert facts.abandoned and facts.opened.keys() == facts.verdicts.keys()
    assert not facts.equivocations


async def test_a_killed_agent_sends_the_same_signed_bytes_again_and_stays_in_service(fleet: LocalFleet) -> None:
    gateway, name = Gateway(fleet), "edge-01"
    async with Load(fleet) as load:
        await load.more(6, BACK_WITHIN_S)
        os.kill(fleet.pids()[name], signal.SIGSTOP)
        await until(lambda: _holds_tasks(gateway, name), 10, "tasks in the agent's hands")
        await fleet.kill(name)
        await load.more(6, BACK_WITHIN_S)  # others are asked in its place
        kept = _outbox(fleet.folder(name))
        assert any(not reported for reported, _ in kept.values()), "nothing to send again: nothing was shown"
        await fleet.restart(name)
        await until(lambda: _reported(fleet, name, kept.keys()), BACK_WITHIN_S, "the outputs kept are sent again")
        await until(lambda: _online(gateway, name), BACK_WITHIN_S, "the agent online")
        await load.more(12, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    outputs = facts.outputs_of(name)
    now = _outbox(fleet.folder(name))
    assert all(now[task][1] == kept[task][1] for task in kept.keys() & now.keys())
    assert outputs.keys() & now.keys() - kept.keys(), "it answered nothing after its restart"
    for task in outputs.keys() & now.keys():
        assert open_message(Output, now[task][1], MAX_TENSORS + 1).raw == outputs[task]
    row = await gateway.agent(name)
    assert row["standing"] in IN_SERVICE and not row["refutations"] and not facts.equivocations


async def test_a_frozen_agent_is_hedged_and_its_late_output_alters_no_vote(fleet: LocalFleet) -> None:
    gateway, name = Gateway(fleet), "edge-02"
    before = await gateway.ask("statistics")
    async with Load(fleet) as load:
        await load.more(2, BACK_WITHIN_S)
        pid = fleet.pids()[name]
        os.kill(pid, signal.SIGSTOP)
        hedges = (await gateway.ask("statistics"))["hedges"]
        try:
            # A task in its hands could have been answered just before; one that had to be hedged was not.
            await until(lambda: _more_hedges(gateway, hedges), BACK_WITHIN_S, "a hedge of a task in the agent's hands")
            await load.more(2, BACK_WITHIN_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: _more_late(gateway, before["late_outputs"]), BACK_WITHIN_S, "late outputs")
    after = await gateway.ask("statistics")
    facts = await check_ledger(fleet.state)
    load.check(facts)
    assert after["hedges"] > before["hedges"]
    kept, outputs = _outbox(fleet.folder(name)), facts.outputs_of(name)
    late = {t for t, v in facts.verdicts.items() if name in v.assigned and t in kept} - outputs.keys()
    assert late and all(facts.verdicts[task].outcome == "accepted" for task in late)
    assert (await gateway.agent(name))["standing"] in IN_SERVICE


async def test_a_killed_broker_costs_no_answer_for_long(fleet: LocalFleet) -> None:
    async with Load(fleet) as load:
        await load.more(3, BACK_WITHIN_S)
        await kill_in_gateway(fleet, "broker")
        await load.more(6, BACK_WITHIN_S)
        gateway = Gateway(fleet)
        for spec in fleet.agents:
            await until(lambda name=spec.name: _online(gateway, name), BACK_WITHIN_S, f"{spec.name} online")  # type: ignore[misc]
        counted = await gateway.ask("statistics")
        await until(lambda: _more_outputs(gateway, counted["outputs"] + 6), BACK_WITHIN_S, "agents answer again")
    load.check(await check_ledger(fleet.state))


async def test_a_broker_silent_for_longer_than_a_task_leaves_the_referee_to_answer(fleet: LocalFleet) -> None:
    gateway = Gateway(fleet)
    before = await gateway.ask("statistics")
    async with Load(fleet) as load:
        await load.more(1, BACK_WITHIN_S)
        pid = gateway_pid(fleet, "broker")
        os.kill(pid, signal.SIGSTOP)
        try:
            await load.more(2, TASK_TIMEOUT_S + 6)
        finally:
            os.kill(pid, signal.SIGCONT)
        await load.more(3, BACK_WITHIN_S)
    load.check(await check_ledger(fleet.state))
    after = await gateway.ask("statistics")
    assert after["referee_executions"] > before["referee_executions"]


async def test_a_killed_ledger_engine_loses_no_acknowledged_entry(fleet: LocalFleet) -> None:
    async with Load(fleet, clients=4, waits=("committed",)) as load:
        await load.more(4, BACK_WITHIN_S)
        acknowledged = load.answers
        await kill_in_gateway(fleet, "ledger", load.flying(2))
        await load.more(4, BACK_WITHIN_S)
        os.kill(gateway_pid(fleet, "ledger"), signal.SIGSTOP)
        await asyncio.sleep(ACK_TIMEOUT_S + 0.5)  # the fault: what authors hand over is neither taken nor refused
        acknowledged += load.answers
        await kill_in_gateway(fleet, "ledger")
        await load.more(4, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    for answer in acknowledged:
        facts.expect(answer)
    assert all(call.error is None for call in load.calls), "a frame in doubt is repeated until it is acknowledged"


async def test_a_killed_validator_never_cosigns_another_root_of_a_size(fleet: LocalFleet) -> None:
    async with Load(fleet, waits=("final", "committed")) as load:
        await load.more(3, BACK_WITHIN_S)
        before = await check_ledger(fleet.state)
        await kill_in_gateway(fleet, "validator-1")
        await load.more(6, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    common = before.cosigned.keys() & facts.cosigned.keys()
    assert common and {size: facts.cosigned[size] for size in common} == {s: before.cosigned[s] for s in common}
    assert max(facts.cosigned) > max(before.cosigned)
    trust = StateLayout(fleet.state).load_trust()
    for answer in (load.answers[0], load.answers[-1]):
        audited = verify_receipt(await Gateway(fleet).ask("receipt", answer.request), trust)
        assert audited.entry == facts.answers[bytes.fromhex(answer.request)]


async def test_a_killed_registrar_disturbs_no_session_and_takes_joins_again(fleet: LocalFleet) -> None:
    gateway, late = Gateway(fleet), AgentSpec("late-01", "owner-late")
    async with Load(fleet) as load:
        await load.more(3, BACK_WITHIN_S)
        before = await gateway.ask("statistics")
        await kill_in_gateway(fleet, "registrar")
        await load.more(6, BACK_WITHIN_S)
        await _join(fleet, late)
        await until(lambda: _online(gateway, late.name), BACK_WITHIN_S, "the new agent online")
    facts = await check_ledger(fleet.state)
    load.check(facts)
    assert all(call.error is None for call in load.calls), "nobody's session hangs on the registrar"
    assert (await gateway.ask("statistics"))["uptime_s"] > before["uptime_s"]
    assert late.name in facts.state.members


async def test_a_killed_gateway_takes_its_children_along_and_goes_on_where_it_stood(fleet: LocalFleet) -> None:
    async with Load(fleet) as load:
        await load.more(4, BACK_WITHIN_S)
        children = descendants(fleet.pids()[GATEWAY])
        ports = read_ports(fleet.state)
        await fleet.kill(GATEWAY)
        await asyncio.gather(*(end_of(pid) for pid in children))
        agents = fleet.pids()
        await fleet.restart(GATEWAY)
        await load.more(4, BACK_WITHIN_S)
    assert read_ports(fleet.state) == ports and fleet.pids().items() >= agents.items()
    await fleet.wait_online(len(agents))
    facts = await check_ledger(fleet.state)
    load.check(facts)
    trust, gateway = StateLayout(fleet.state).load_trust(), Gateway(fleet)
    first = next(call.answer for call in load.calls if call.answer is not None and call.wait == "committed")
    audited = verify_receipt(await gateway.ask("receipt", first.request), trust)
    assert audited.entry == facts.answers[bytes.fromhex(first.request)]
    assert fleet.failed.done() is False, "an agent ended"


async def _running(fleet: LocalFleet) -> bool:
    return (await Gateway(fleet).ask("statistics"))["tasks_running"] > 0


async def _holds_tasks(gateway: Gateway, name: str) -> bool:
    return (await gateway.agent(name))["load"] > 0


async def _online(gateway: Gateway, name: str) -> bool:
    return (await gateway.agent(name))["online"]


async def _more_hedges(gateway: Gateway, count: int) -> bool:
    return (await gateway.ask("statistics"))["hedges"] > count


async def _more_late(gateway: Gateway, count: int) -> bool:
    return (await gateway.ask("statistics"))["late_outputs"] > count


async def _more_outputs(gateway: Gateway, count: int) -> bool:
    return (await gateway.ask("statistics"))["outputs"] >= count


async def _reported(fleet: LocalFleet, name: str, tasks: Collection[bytes]) -> bool:
    now = _outbox(fleet.folder(name))
    return all(now[task][0] for task in tasks if task in now)


async def _join(fleet: LocalFleet, spec: AgentSpec) -> None:
    async def joined() -> bool:
        await fleet.start_agents([spec])
        return True

    await until(joined, BACK_WITHIN_S, "a join")


def _outbox(folder: Path) -> dict[bytes, tuple[bool, bytes]]:
    """What an agent has signed and kept, by task: whether the broker is known to have it, and the message."""
    with closing(sqlite3.connect(f"file:{folder / 'outbox.db'}?mode=ro", uri=True)) as db:
        rows = db.execute(
            "SELECT task, reported.number IS NOT NULL, message FROM output LEFT JOIN reported USING (number)"
        ).fetchall()
    return {task: (bool(reported), message) for task, reported, message in rows}
