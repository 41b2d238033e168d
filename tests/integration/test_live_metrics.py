"""/metrics of a running fleet: every family of the table, figures of all five processes, and counts that fit answers."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fault_tools import until
from live_fleet import PATIENCE_S, LiveFleet
from prometheus_client.parser import text_string_to_metric_families

from bmoe.protocol.errors import InputError
from coordinator.embedded.ports import read_ports
from coordinator.metrics import METRICS

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROCESSES = {"broker", "ledger", "registrar", "validator-1", "coordinator"}


async def scrape(state: Path) -> dict[str, Any]:
    """The families by name."""

    def get() -> str:
        url = f"http://127.0.0.1:{read_ports(state)['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read().decode())

    return {family.name: family for family in text_string_to_metric_families(await asyncio.to_thread(get))}


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    """The sum of the samples of a name whose labels include those given."""
    found = [s for family in families.values() for s in family.samples if s.name == sample]
    return float(sum(s.value for s in found if labels.items() <= s.labels.items()))


async def test_figures_count_what_the_fleet_did(fleet: LiveFleet) -> None:
    before = await scrape(fleet.fleet.state)
    answer = await fleet.answers_right("full")
    with pytest.raises(InputError):
        await fleet.gateway.ask("infer", "no-such-model", {"window": fleet.windows})
    after = await scrape(fleet.fleet.state)

    def grown(sample: str, **labels: str) -> float:
        return value(after, sample, **labels) - value(before, sample, **labels)

    assert grown("bmoe_requests_total", model="wearable", outcome="answered") == 1
    assert grown("bmoe_request_seconds_count", model="wearable") == 1
    assert grown("bmoe_rows_answered_total") == len(fleet.windows)
    for stage in ("queue", "open", "decide", "commit"):
        assert grown("bmoe_stage_seconds_count", stage=stage) >= len(answer.verdicts), stage
    assert grown("bmoe_stage_seconds_count", stage="output") >= len(fleet.honest) * len(answer.verdicts)
    assert value(after, "bmoe_ledger_final_size") > value(before, "bmoe_ledger_final_size")
    assert grown("bmoe_finality_seconds_count") > 0 and grown("bmoe_ledger_append_seconds_count") > 0


async def test_every_metric_of_the_table_is_told_and_no_other(fleet: LiveFleet) -> None:
    families = await scrape(fleet.fleet.state)
    told = {name for name in families if name.startswith("bmoe_")}
    assert told == {metric.name.removesuffix("_total") for metric in METRICS}
    assert value(families, "bmoe_link_up") == 1 and value(families, "bmoe_disk_free_bytes") > 0
    assert {s.labels["agent"] for s in families["bmoe_agent_online"].samples if s.value} >= set(fleet.honest)


async def test_all_processes_tell_their_figures(fleet: LiveFleet) -> None:
    families: dict[str, Any] = {}

    async def told() -> bool:
        nonlocal families
        families = await scrape(fleet.fleet.state)
        return (
            value(families, "bmoe_process_up") == len(PROCESSES)
            and value(families, "bmoe_validator_signed_size") > 0
            and value(families, "bmoe_registrar_events_total", event="enrolled") >= len(fleet.honest)
        )

    await until(told, PATIENCE_S, "each process's figures, which are written every 5 s")
    assert {s.labels["process"] for s in families["bmoe_process_up"].samples if s.value} == PROCESSES
    assert {s.labels["process"] for s in families["bmoe_figures_age_seconds"].samples} >= {"up", "registrar"}
    assert value(families, "bmoe_validator_signed_size", validator="validator-1") > 0
