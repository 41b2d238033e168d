"""Figures: what is counted, how it is told to Prometheus, and alerts that speak of nothing that is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scripts import by_path

from bmoe.protocol.errors import ConfigError, InputError, RefusedError, UnavailableError
from bmoe.protocol.figures import BOUNDS, FILE_BYTES, Seconds, read_figures, write_figures
from bmoe.storage.packaged import packaged
from coordinator.counts import OTHER, TENANTS_MAX, RequestCounts, counted
from coordinator.embedded.supervisor import Event
from coordinator.exposition import _family, metrics_app
from coordinator.metrics import METRICS, Metric
from coordinator.process_figures import ProcessFigures

ROOT = Path(__file__).resolve().parents[2]
RULES = packaged("firmware_configs", "prometheus") / "alerts.yml"
NAMES = {metric.name: metric for metric in METRICS}
UNITS = ("_seconds", "_bytes", "_celsius", "_ratio", "_total", "_info")
# Numbers of things, and states of 0 or 1, have no unit.
PLAIN = re.compile(r"_(up|online|load|queued|unreported|throttled|work|running|agents|suspected|waiting|size|overdue|"
                   r"disagree|position)$|^bmoe_agents")  # fmt: skip


# The table.


def test_names_follow_the_conventions_of_prometheus() -> None:
    assert len(NAMES) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"bmoe(_[a-z]+)+", metric.name), metric.name
        assert metric.name.endswith(UNITS) or PLAIN.search(metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.kind != "histogram" or metric.name.endswith("_seconds"), metric.name
        assert metric.meaning.endswith(".") and all(re.fullmatch("[a-z]+", label) for label in metric.labels)


def test_a_histogram_is_told_as_prometheus_reads_it() -> None:
    seconds = Seconds()
    for value in (0.0, 0.001, 0.0011, 3.0, 1000.0):
        seconds.add(value)
    metric = Metric("bmoe_x_seconds", "histogram", ("stage",), "X.", lambda r: ())
    family = _family(metric, [(("gate",), seconds)])
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert len(buckets) == len(BOUNDS) + 1
    assert (buckets["0.001"], buckets["0.002"], buckets["2"], buckets["4"], buckets["+Inf"]) == (2, 3, 3, 4, 5)
    values = {sample.name: sample.value for sample in family.samples if not sample.name.endswith("_bucket")}
    assert values == {"bmoe_x_seconds_count": 5, "bmoe_x_seconds_sum": pytest.approx(1003.0021)}


async def test_only_metrics_are_served_on_their_port() -> None:
    app = metrics_app(CollectorRegistry())
    statuses = {}
    for method, path in (("GET", "/metrics"), ("POST", "/metrics"), ("GET", "/"), ("GET", "/v1/fleet")):
        sent: list[dict[str, object]] = []

        async def send(message: dict[str, object], sent: list[dict[str, object]] = sent) -> None:
            sent.append(message)

        await app({"type": "http", "method": method, "path": path, "headers": []}, None, send)
        statuses[method, path] = sent[0]["status"]
    assert {key for key, status in statuses.items() if status == 200} == {("GET", "/metrics")}


def test_a_label_of_a_liar_s_making_does_not_break_the_format() -> None:
    metric = Metric("bmoe_x", "gauge", ("agent",), "X.", lambda r: ())

    class Registry(CollectorRegistry):
        def collect(self) -> Iterator[object]:  # type: ignore[override]
            yield _family(metric, [(('a"b\n# HELP \\',), 1.0)])

    (family,) = text_string_to_metric_families(generate_latest(Registry()).decode())
    assert family.samples[0].labels == {"agent": 'a"b\n# HELP \\'}


# Requests.


class Service:
    """Something that answers as it is told."""

    def __init__(self) -> None:
        self.counts = RequestCounts(lambda: ["wearable"])
        self.error: BaseException | None = None

    @counted
    async def infer(self, model: str, body: bytes, tenant: str) -> str:
        if self.error is not None:
            raise self.error
        return "answer"


async def test_requests_are_counted_by_what_became_of_them() -> None:
    service = Service()
    assert await service.infer("wearable", b"", "ada") == "answer"
    for error in (InputError("x"), RefusedError("x"), UnavailableError("x"), ConfigError("x"), ValueError("x")):
        service.error = error
        with pytest.raises(type(error)):
            await service.infer("wearable", b"", "ada")
    assert {outcome: count for (_, _, outcome), count in service.counts.by.items()} == {
        "answered": 1, "bad_request": 1, "refused": 1, "unavailable": 1, "failed": 1, "fault": 1,
    }  # fmt: skip
    assert sum(service.counts.seconds["wearable"].counts) == 1


async def test_names_from_outside_make_no_series_without_end() -> None:
    service = Service()
    for number in range(3 * TENANTS_MAX):
        await service.infer("wearable", b"", f"tenant-{number}")
    service.error = InputError("model is not served here")
    for number in range(100):
        with pytest.raises(InputError):
            await service.infer(f"no-model-{number}", b"", "tenant-0")
    assert len({tenant for _, tenant, _ in service.counts.by}) == TENANTS_MAX + 1
    assert {model for model, _, _ in service.counts.by} == {"wearable", OTHER}
    assert sum(service.counts.by.values()) == 3 * TENANTS_MAX + 100, "one was not counted"


# Figures of other processes.


def test_figures_are_handed_on_with_their_age(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "up.json"
    processes = ProcessFigures()
    for kind in ("started", "ready", "exited", "restarting", "started"):
        processes.note(Event("broker", kind, 1))  # type: ignore[arg-type]
    write_figures(path, processes.figures())
    os.utime(path, (time.time() - 90,) * 2)
    figures, age_s = read_figures(path)
    assert figures == {"starts broker": 2, "up broker": 0}
    assert 89 < age_s < 120
    assert path.parent.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"size": "many"}', b'{"size": true}', b"{" * (FILE_BYTES + 1)])
def test_damaged_figures_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "up.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_figures(path)


# Alerts.


def expressions() -> list[str]:
    """The `expr` of each rule; one that goes on over several lines is folded."""
    text = RULES.read_text(encoding="utf-8")
    return [" ".join(e.split()).removeprefix(">- ") for e in re.findall(r"expr: (.*?)\n\s+(?:for|labels):", text, re.S)]


def test_every_alert_speaks_of_metrics_and_labels_that_exist() -> None:
    found = expressions()
    assert len(found) == RULES.read_text(encoding="utf-8").count("alert:") > 20
    for expression in found:
        selectors = re.findall(r"\b(bmoe_\w+|up)\b(?:\{([^}]*)\})?", expression)
        assert selectors, expression
        for name, matchers in selectors:
            if name == "up":
                continue  # Prometheus' own
            metric = NAMES.get(name) or NAMES[name.removesuffix("_bucket")]
            assert name == metric.name or metric.kind == "histogram", expression
            assert set(re.findall(r"(\w+)(?:=~?)", matchers)) <= set(metric.labels), expression


def test_every_event_that_an_alert_waits_for_is_logged_somewhere() -> None:
    docs = by_path(ROOT / "tests" / "unit" / "test_docs.py")
    for matched in re.findall(r'event=~?"([^"]*)"', " ".join(expressions())):
        assert set(matched.split("|")) <= docs.events("coordinator/"), matched


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    rules = RULES.read_text(encoding="utf-8").split("- alert: ")[1:]
    for rule in rules:
        assert re.search(r"severity: (critical|warning|info)\}", rule), rule
        assert re.search(r"summary: \S.{10}", rule) and re.search(r"action: \S.{20}", rule), rule
        used = set(re.findall(r"\$labels\.(\w+)", rule)) - {"instance"}
        named = [NAMES[name] for name in re.findall(r"bmoe_\w+", rule.split("labels:")[0]) if name in NAMES]
        assert used <= {label for metric in named for label in metric.labels}, rule


def promtool() -> str | None:
    fetched = ROOT / ".test-tools" / "usr" / "bin" / "promtool"
    return str(fetched) if fetched.exists() else shutil.which("promtool")


@pytest.mark.skipif(promtool() is None, reason="no promtool: `make test-tools` fetches it")
def test_prometheus_itself_takes_the_rules_and_fires_them(tmp_path: Path) -> None:
    story = tmp_path / "story.yml"
    story.write_text(
        f"""
rule_files: ["{RULES}"]
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {{series: 'bmoe_ledger_stalled_seconds{{job="bmoe"}}', values: '0x8 12 27 42 0x20'}}
      - {{series: 'bmoe_process_starts_total{{job="bmoe",process="validator-1"}}', values: '1x8 2 3 4 5x40'}}
    alert_rule_test:
      - {{eval_time: 1m, alertname: BmoeLedgerStalled, exp_alerts: []}}
      - eval_time: 2m30s
        alertname: BmoeLedgerStalled
        exp_alerts:
          - exp_labels: {{severity: critical, job: bmoe}}
            exp_annotations:
              summary: The ledger engine has not acknowledged a frame for 27s
              action: A full disk, or the engine is down. See `server_alarm` in the log of `bmoe up`. Requests wait.
      - {{eval_time: 5m, alertname: BmoeLedgerStalled, exp_alerts: []}}
    promql_expr_test:
      - expr: count(ALERTS{{alertname="BmoeProcessRestarting"}})
        eval_time: 5m
        exp_samples: [{{labels: '{{}}', value: 1}}]
"""
    )
    for words in (("check", "rules", str(RULES)), ("test", "rules", str(story))):
        done = subprocess.run([promtool() or "", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
