"""Every metric of a gateway in one table: name, kind, labels, meaning, and where its value is read.

Nothing here runs while requests are served: parts count in plain numbers, and a scrape reads them. Registrar,
validators and `bmoe up` are other processes; each hands its figures on in a small file (bmoe/protocol/figures.py).
Names follow https://prometheus.io/docs/practices/naming/. docs/operations.md and the alert rules are checked against
this table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmoe import __version__
from bmoe.protocol.errors import InputError
from bmoe.protocol.figures import Figures, Seconds, read_figures
from coordinator import logs
from coordinator.disk import free_bytes

if TYPE_CHECKING:
    from coordinator.gateway import Gateway

Sample = tuple[tuple[str, ...], "float | Seconds"]
SIDE_PROCESSES = ("up", "registrar")


class Reading:
    """One look at the gateway: its parts, and the files that the other processes wrote."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.others = dict(_handed_on(gateway))
        self.agents = [
            (name, gateway.fleet.of(name)) for name, a in gateway.state.agents.items() if a.standing.value != "revoked"
        ]

    def of(self, process: str, figure: str) -> Iterator[Sample]:
        """A figure of another process, if it told it."""
        figures, _ = self.others.get(process, ({}, 0.0))
        if figure in figures:
            yield (), figures[figure]

    def of_validators(self, figure: str) -> Iterator[Sample]:
        """A figure of each validator that told it."""
        for name in sorted(self.gateway.state.validators):
            for _, value in self.of(name, figure):
                yield (name,), value

    def starts(self, what: str) -> Iterator[Sample]:
        """Figures of the supervisor that go by a process's name."""
        for key, value in self.others.get("up", ({}, 0.0))[0].items():
            kind, _, process = key.partition(" ")
            if kind == what and process:
                yield (process,), value

    def health(self, field: str, key: int, scale: float = 1.0) -> Iterator[Sample]:
        """What each board last said of itself; nothing of those that are away or cannot read it."""
        for name, presence in self.agents:
            health = presence.health
            if presence.online and health is not None and key in health.known:
                yield (name,), getattr(health, field) * scale


@dataclass(frozen=True)
class Metric:
    """One family. `read` gives (label values, value) pairs; a histogram's values are Seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[Reading], Iterable[Sample]]


def _handed_on(gateway: Gateway) -> Iterator[tuple[str, tuple[Figures, float]]]:
    for name in (*SIDE_PROCESSES, *gateway.state.validators):
        try:
            yield name, read_figures(gateway.layout.figures(name))
        except (OSError, InputError):
            continue  # not started yet, or damaged: its age is missing, which an alert can see


def _one(value: Callable[[Gateway], float]) -> Callable[[Reading], Iterable[Sample]]:
    return lambda reading: [((), value(reading.gateway))]


def _stages(reading: Reading) -> Iterator[Sample]:
    gateway = reading.gateway
    tally, count = gateway.decider.tally, gateway.answerer.count
    stages = (("gate", count.gate), ("queue", tally.queue), ("open", tally.open), ("output", tally.output))
    for name, seconds in (*stages, ("decide", tally.decide), ("commit", tally.commit), ("enter", count.enter)):
        yield (name,), seconds


def _files(reading: Reading) -> Iterator[Sample]:
    layout = reading.gateway.layout
    paths = {"evidence": layout.evidence, "journal": layout.journal}
    paths |= {name: layout.validator(name) / "replica.db" for name in reading.gateway.state.validators}
    for name, path in paths.items():
        yield (name,), sum(_size(path.with_name(path.name + end)) for end in ("", "-wal"))


def _disks(reading: Reading) -> Iterator[Sample]:
    layout = reading.gateway.layout
    for name, path in (("state", layout.root), ("evidence", layout.evidence.parent), ("ledger", layout.ledger)):
        yield (name,), free_bytes(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _standing(reading: Reading) -> Iterator[Sample]:
    found = dict.fromkeys(("probation", "trusted", "doubted", "quarantined", "revoked"), 0)
    for record in reading.gateway.state.agents.values():
        found[record.standing.value] += 1
    for standing, number in found.items():
        yield (standing,), number


def _rollouts(reading: Reading) -> list[dict[str, Any]]:
    return [row for row in reading.gateway.rollouts.table() if "agents" in row]


def _rollout_agents(reading: Reading) -> Iterator[Sample]:
    for row in _rollouts(reading):
        failed = sum(name in row["wave"] for name in row["lacks"])
        for state, number in (("wanted", len(row["wave"])), ("installed", len(row["holds"])), ("failed", failed)):
            yield (row["model"], state), number


def _suspected(gateway: Gateway) -> float:
    now = time.monotonic()
    return sum(presence.suspected_until > now for presence in gateway.fleet.presence.values())


METRICS: tuple[Metric, ...] = (
    Metric("bmoe_build_info", "gauge", ("version",), "The version that runs.", lambda r: [((__version__,), 1)]),
    Metric("bmoe_requests_total", "counter", ("model", "tenant", "outcome"),
        "Requests by outcome: answered, refused, bad_request, unavailable, failed, fault, cancelled.",
        lambda r: r.gateway.counts.by.items()),
    Metric("bmoe_http_errors_total", "counter", ("status",),
        "Error replies to infer over HTTP by status; 401, 413 and 429 are refused before they count as requests.",
        lambda r: (((str(status),), n) for status, n in r.gateway.counts.http_errors.items())),
    Metric("bmoe_request_seconds", "histogram", ("model",), "From a request's body to its answer.",
        lambda r: (((model,), seconds) for model, seconds in r.gateway.counts.seconds.items())),
    Metric("bmoe_stage_seconds", "histogram", ("stage",),
        "Stages: gate (with the journal), queue (to share a task), open (entered), output (of one agent), decide, "
        "commit (the verdict), enter (the answer).", _stages),
    Metric("bmoe_requests_in_work", "gauge", (), "Requests in work; `requests_waiting` is the limit.",
        _one(lambda g: g.in_work)),
    Metric("bmoe_rows_answered_total", "counter", (), "Rows of the requests answered.",
        _one(lambda g: g.answerer.count.rows)),
    Metric("bmoe_promises_overdue", "gauge", (), "Answers given, promised, not on the ledger, and past the deadline.",
        _one(lambda g: g.answerer.overdue())),
    Metric("bmoe_promises_missed_total", "counter", ("how",), "Promises kept late, or broken.",
        lambda r: [(("late",), r.gateway.answerer.count.late), (("broken",), r.gateway.answerer.count.broken)]),
    Metric("bmoe_tasks_total", "counter", (), "Tasks opened.", _one(lambda g: g.decider.tally.tasks)),
    Metric("bmoe_tasks_running", "gauge", (), "Tasks without a verdict yet.", _one(lambda g: g.decider.running)),
    Metric("bmoe_tasks_undecided_total", "counter", (), "Tasks whose verdict holds no value.",
        _one(lambda g: g.decider.tally.undecided)),
    Metric("bmoe_outputs_total", "counter", ("kind",), "Outputs counted, late, or refused.",
        lambda r: [((kind,), getattr(r.gateway.decider.tally, name)) for kind, name in
            (("counted", "outputs"), ("late", "late"), ("refused", "refused_outputs"))]),
    Metric("bmoe_hedges_total", "counter", (), "Times that a further agent was asked.",
        _one(lambda g: g.decider.tally.hedges)),
    Metric("bmoe_refusals_total", "counter", ("reason",), "Tasks that agents refused; `expired` in numbers: a clock.",
        lambda r: (((reason,), n) for reason, n in r.gateway.decider.tally.refusals.items())),
    Metric("bmoe_referee_runs_total", "counter", (), "Experts re-executed by the coordinator.",
        _one(lambda g: g.referee.executions)),
    Metric("bmoe_link_up", "gauge", (), "1 while the coordinator is connected to the broker.",
        _one(lambda g: float(g.link.connected))),
    Metric("bmoe_agents_online", "gauge", (), "Agents that can be asked over MQTT.",
        lambda r: [((), sum(p.online for _, p in r.agents))]),
    Metric("bmoe_agents", "gauge", ("standing",), "Enrolled agents by standing.", _standing),
    Metric("bmoe_agents_suspected", "gauge", (), "Agents that the coordinator does not ask for a while.",
        _one(_suspected)),
    Metric("bmoe_agent_online", "gauge", ("agent",), "1 while the agent is online.",
        lambda r: (((name,), float(p.online)) for name, p in r.agents)),
    Metric("bmoe_agent_load", "gauge", ("agent",), "Tasks in an agent's hands, as the coordinator counts.",
        lambda r: (((name,), p.load) for name, p in r.agents)),
    Metric("bmoe_agent_queued", "gauge", ("agent",), "Tasks in work, as the agent says.",
        lambda r: r.health("queued", 12)),
    Metric("bmoe_agent_answered_total", "counter", ("agent",), "Tasks answered since the agent's start.",
        lambda r: r.health("answered", 13)),
    Metric("bmoe_agent_refused_total", "counter", ("agent",), "Tasks refused since the agent's start.",
        lambda r: r.health("refused", 14)),
    Metric("bmoe_agent_unreported", "gauge", ("agent",), "Signed outputs that the broker has not acknowledged.",
        lambda r: r.health("unreported", 15)),
    Metric("bmoe_agent_clock_skew_seconds", "gauge", ("agent",), "How far the board's clock is ahead of the gateway's.",
        lambda r: (((name,), r.gateway.clocks.skews[name]) for name, p in r.agents
            if p.online and name in r.gateway.clocks.skews)),
    Metric("bmoe_agent_cpu_ratio", "gauge", ("agent",), "CPU use of the board, 0 to 1.",
        lambda r: r.health("cpu_percent", 8, 0.01)),
    Metric("bmoe_agent_temperature_celsius", "gauge", ("agent",), "Temperature of the board.",
        lambda r: r.health("temperature_mc", 9, 0.001)),
    Metric("bmoe_agent_memory_free_bytes", "gauge", ("agent",), "Memory to be had on the board.",
        lambda r: r.health("memory_free_mb", 10, 2.0**20)),
    Metric("bmoe_agent_throttled", "gauge", ("agent",), "Raspberry Pi firmware bits; 0 is well.",
        lambda r: r.health("throttled", 11)),
    Metric("bmoe_ledger_append_seconds", "histogram", (), "From a frame's sending to its acknowledgement.",
        lambda r: [((), r.gateway.author.append_s)]),
    Metric("bmoe_ledger_stalled_seconds", "gauge", (), "Age of the frame that the engine has not acknowledged.",
        _one(lambda g: g.author.stalled_s)),
    Metric("bmoe_ledger_waiting", "gauge", (), "Groups of entries that wait for the engine.",
        _one(lambda g: g.author.waiting)),
    Metric("bmoe_ledger_entries_total", "counter", (), "Entries made by this coordinator.",
        _one(lambda g: g.author.entries)),
    Metric("bmoe_ledger_size", "gauge", (), "Leaves of the ledger, as the coordinator folds it.",
        _one(lambda g: g.state.size)),
    Metric("bmoe_ledger_final_size", "gauge", (), "Leaves under a quorum's checkpoint.",
        _one(lambda g: g.finality.final_size)),
    Metric("bmoe_finality_seconds", "histogram", (), "From a verdict's or answer's entry to its being final.",
        lambda r: [((), r.gateway.finality.lag_s)]),
    Metric("bmoe_unfinal_seconds", "gauge", (), "Age of the oldest verdict or answer that is not final.",
        _one(lambda g: g.finality.unfinal_s)),
    Metric("bmoe_validators_disagree", "gauge", (), "1 if a quorum signed another root than the coordinator's.",
        _one(lambda g: float(bool(g.finality.disagreement)))),
    Metric("bmoe_journal_bytes", "gauge", (), "Inputs of requests in work.", _one(lambda g: g.journal.held_bytes)),
    Metric("bmoe_file_bytes", "gauge", ("file",), "Size of evidence, journal, and each validator's replica.", _files),
    Metric("bmoe_disk_free_bytes", "gauge", ("folder",), "Room on the file systems of what a gateway writes.", _disks),
    Metric("bmoe_process_starts_total", "counter", ("process",), "Starts by the supervisor; more than 1 is a restart.",
        lambda r: r.starts("starts")),
    Metric("bmoe_process_up", "gauge", ("process",), "1 while the process runs and has said that it is ready.",
        lambda r: r.starts("up")),
    Metric("bmoe_figures_age_seconds", "gauge", ("process",), "Age of what another process told of itself.",
        lambda r: (((name,), age) for name, (_, age) in r.others.items())),
    Metric("bmoe_validator_size", "gauge", ("validator",), "Leaves that the validator has folded.",
        lambda r: r.of_validators("size")),
    Metric("bmoe_validator_signed_size", "gauge", ("validator",), "Largest size that it has cosigned.",
        lambda r: r.of_validators("signed_size")),
    Metric("bmoe_validator_checks_total", "counter", ("validator",), "Verdicts that it re-executed.",
        lambda r: r.of_validators("checks")),
    Metric("bmoe_validator_checks_waiting", "gauge", ("validator",), "Re-executions that wait.",
        lambda r: r.of_validators("checks_waiting")),
    Metric("bmoe_validator_rejected_total", "counter", ("validator",), "Entries that the rules refused.",
        lambda r: r.of_validators("rejected")),
    Metric("bmoe_registrar_position", "gauge", (), "Ledger position that the registrar has folded.",
        lambda r: r.of("registrar", "position")),
    Metric("bmoe_registrar_events_total", "counter", ("event",), "Events that the registrar logged.",
        lambda r: (((key[6:],), n) for key, n in r.others.get("registrar", ({}, 0.0))[0].items()
            if key.startswith("event "))),
    Metric("bmoe_rollout_info", "gauge", ("model", "version", "stage"), "The latest rollout of each model, and its stage.",
        lambda r: (((row["model"], str(row["version"]), row["stage"]), 1) for row in r.gateway.rollouts.table())),
    Metric("bmoe_rollout_agents", "gauge", ("model", "state"),
        "Agents wanted to hold the version, those that say they do, and those that refuse it or failed.",
        _rollout_agents),
    Metric("bmoe_rollout_serving_ratio", "gauge", ("model",), "Share of the requests that the new version answers.",
        lambda r: (((row["model"],), row["share"]) for row in _rollouts(r))),
    Metric("bmoe_rollouts_ended_total", "counter", ("outcome", "reason"),
        "Rollouts that ended since the ledger began: done, rolled-back or aborted, and why.",
        lambda r: r.gateway.rollouts_ended.counts.items()),
    Metric("bmoe_log_events_total", "counter", ("event", "level"), "Events that the coordinator logged.",
        lambda r: logs.counts.items()),
)  # fmt: skip
