"""The bench's pure parts: what it counts, how it sums up, and that no request asks what another has asked."""

from __future__ import annotations

import re

import numpy as np
import orjson
import pytest

from benchmarks.bench.account import LOOP, busy_seconds, used
from benchmarks.bench.bodies import SLOT_STEPS, first_output, slot_value, template
from benchmarks.bench.figures import CLIENT, OTHERS, Case, Measured, find, grouped, last_line, percentile, summed
from benchmarks.bench.floor import Primitives
from benchmarks.bench.report import Circumstances, report, stages
from benchmarks.bench.stages import OUTSIDE, shares
from benchmarks.peers import report as peers_report
from bmoe.protocol.errors import InputError, MessageError, UnavailableError
from coordinator.intake import DATATYPES

SHARES = {"single b1": {"MQTT": 0.25, "intake": 0.75}, "single b32": {"intake": 1.0}}


def measured(policy: str, rows: int, connections: int, latencies: list[float], **more: object) -> Measured:
    return Measured(Case(policy, rows, connections), 2.0, latencies, len(latencies), **more)  # type: ignore[arg-type]


def whole_run() -> list[Measured]:
    """One round of every case; verified takes twice as long as unverified."""
    cpu = {LOOP: 0.3, "agent": 0.1, CLIENT: 9.0, OTHERS: 5.0}
    found = [measured("in process", rows, 1, [1.0, 2.0], cpu_s={"in process": 0.002}) for rows in (1, 32)]
    for policy, each_ms in (("single", 10.0), ("referee", 12.5), ("full", 50.0)):
        for rows in (1, 32):
            for connections in (8, 1):
                answers = [each_ms] * int(200 / each_ms)
                counts = {"tasks": 2 * len(answers), "executions": 4 * len(answers), "task_rows": 8 * len(answers)}
                found.append(measured(policy, rows, connections, answers, cpu_s=cpu, counts=counts))
    return found


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.5, 5.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        (list(range(1, 101)), 0.99, 99),
        (list(range(1, 101)), 0.07, 7),
        (list(range(1, 102)), 0.99, 100),
        (list(range(1, 101)), 1.0, 100),
    ],
)
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_no_percentile_is_made_up(values: list[float], share: float) -> None:
    with pytest.raises(InputError, match="a percentile needs values"):
        percentile(values, share)


def test_rounds_are_summed_by_their_median_with_the_spread_told() -> None:
    rounds = [measured("single", 32, 4, [10.0] * n, cpu_s={LOOP: 0.1 * n}) for n in (10, 40, 20)]
    figures = summed(rounds)
    assert (figures.least, figures.items_per_s, figures.most) == (160.0, 320.0, 640.0)
    assert figures.cpu_ms == {LOOP: pytest.approx(100.0)}


def test_cpu_a_request_counts_the_fleet_alone_and_all_of_the_phase() -> None:
    """20 requests were answered, 15 within the measured time: the CPU was spent on 20."""
    case = Case("referee", 1, 8)
    cpu = {LOOP: 0.2, "agent": 0.1, CLIENT: 3.0, OTHERS: 7.0}
    counts = {"tasks": 10.0, "executions": 25.0, "task_rows": 40.0}
    figures = summed([Measured(case, 1.0, [4.0] * 15, 20, cpu, counts)])
    assert figures.items_per_s == 15.0
    assert figures.cpu_ms_per_request == pytest.approx(15.0)
    assert figures.cpu_ms_per_task == pytest.approx(30.0)
    assert (figures.rows_per_task, figures.executions_per_task) == (4.0, 2.5)


def test_a_process_that_ended_between_two_looks_takes_nothing_off() -> None:
    assert used({"agent": 5.0, "gone": 1.0}, {"agent": 4.0, "new": 0.5}) == {"agent": 0.0, "new": 0.5}


def test_waiting_for_a_disk_is_not_being_busy() -> None:
    assert busy_seconds("cpu  100 0 50 9000 700 0 50 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == pytest.approx(2.0)


def test_the_last_line_is_as_agreed() -> None:
    line = last_line(grouped(whole_run()), 61.74, 0.638)
    number = r"-?\d+(\.\d+)?"
    names = (
        "unverified_b1_per_s", "verified_b1_per_s", "verified_b32_per_s", "cpu_ms_per_task", "verified_over_unverified",
        "added_p50_pct", "agent_pss_mb", "agent_start_s",
    )  # fmt: skip
    assert re.fullmatch("BENCH " + " ".join(f"{name}={number}" for name in names), line)
    values = dict(part.split("=") for part in line.split()[1:])
    assert values["unverified_b1_per_s"] == "10.0" and values["verified_b1_per_s"] == "8.0"
    assert values["verified_b32_per_s"] == "256.0"
    assert values["verified_over_unverified"] == "0.800" and values["added_p50_pct"] == "25.0"
    assert values["cpu_ms_per_task"] == "12.50"  # 0.4 s over 16 requests of two tasks
    assert values["agent_pss_mb"] == "61.7" and values["agent_start_s"] == "0.64"


def test_a_run_without_the_verified_policy_has_no_last_line() -> None:
    figures = grouped([m for m in whole_run() if m.case.policy != "referee"])
    with pytest.raises(InputError, match="referee at batch 1, loaded, was not measured"):
        last_line(figures, 1.0, 1.0)


def test_the_report_accounts_for_every_process() -> None:
    circumstances = Circumstances(
        "a machine", ["a setting"], Primitives(0.05, 0.1, 0.3), {LOOP: 0.01, OTHERS: 1.0}, 2, SHARES
    )
    text = report(grouped(whole_run()), circumstances, ["61 MiB"])
    table = text.split("## Where the CPU goes")[1].split("##")[0]
    for kind in (LOOP, "agent", CLIENT, OTHERS, "the fleet together"):
        assert kind in table
    # single b1: 20 answers in 2 s of two cores; 0.4 s of the fleet's CPU
    assert "| the 2 cores' time | 200.00 |" in table and "| **the fleet together** | 20.00 |" in table
    assert "| items/s if fleet and client had the cores to themselves | 4.26 |" in table  # 20 ms, and the client's 450
    assert "| MQTT | 3.75 | 0.00 |" in text  # a quarter of the 15 ms that the loop took
    assert "other programs took 35% of the CPU" in text
    assert "nobody asking: 10 ms of CPU a second" in text


def test_what_cannot_be_sampled_is_said_not_guessed() -> None:
    assert stages({}, "py-spy is not installed") == ["Not sampled: py-spy is not installed."]


STACKS = """\
thread (1): MainThread;main (coordinator/service.py:57);_writable (bmoe/protocol/connection.py:9);send (ssl.py:1) 3
thread (1): MainThread;main (coordinator/service.py:57);_infer (coordinator/api.py:1);seal (bmoe/protocol/envelope.py:57) 2
thread (1): MainThread;main (coordinator/service.py:57);run (uvloop/__init__.py:92);app (fastapi/routing.py:175) 4
thread (1): MainThread;main (coordinator/service.py:57);run (uvloop/__init__.py:92);f (bmoe/new_part.py:1) 1
thread (2): worker;_commit (bmoe/ledger/store.py:3) 90
"""


def test_a_sample_counts_for_our_innermost_function_on_the_main_thread() -> None:
    assert shares(STACKS) == {OUTSIDE: 0.4, "MQTT": 0.3, "encode and decode": 0.2, "bmoe/new_part.py": 0.1}
    with pytest.raises(UnavailableError, match="no sample"):
        shares(STACKS.splitlines()[-1])


def test_one_client_is_told_from_many() -> None:
    figures = grouped(whole_run())
    assert find(figures, "single", 1, loaded=False).case.connections == 1
    assert find(figures, "single", 1, loaded=True).case.connections == 8


def parsed(request: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v2/models/m/infer HTTP/1.1"
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}, body


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("encoding", ["json", "binary"])
def test_every_request_carries_the_inputs_it_says_and_no_row_comes_twice(encoding: str, rows: int) -> None:
    windows = np.random.default_rng(1).normal(size=(rows, 6, 100)).astype(np.float32)
    made = template(windows, "window", encoding, "/v2/models/m/infer", {"policy": "single"}, "host:1")
    seen: set[bytes] = set()
    for number in (0, 1, 7, SLOT_STEPS // rows - 1):
        headers, body = parsed(made.fill(number))
        assert int(headers["content-length"]) == len(body)
        length = int(headers.get("inference-header-content-length", len(body)))
        request = orjson.loads(body[:length])
        tensor = request["inputs"][0]
        assert (tensor["name"], tensor["shape"], DATATYPES[tensor["datatype"]]) == ("window", [rows, 6, 100], "float32")
        sent = (
            np.array(tensor["data"], np.float32)
            if encoding == "json"
            else np.frombuffer(body[length : length + tensor["parameters"]["binary_data_size"]], "<f4")
        ).reshape(rows, 6, 100)
        assert np.array_equal(sent, made.inputs(number))
        assert request["parameters"]["policy"] == "single"
        seen |= {row.tobytes() for row in sent}
    assert len(seen) == 4 * rows


def test_slot_values_are_exact_in_float32() -> None:
    values = [slot_value(count) for count in (0, 1, SLOT_STEPS // 3, SLOT_STEPS - 1)]
    assert values == [float(np.float32(value)) for value in values] == [float(np.float32(f"{v:.10f}")) for v in values]
    assert slot_value(SLOT_STEPS) == slot_value(0)


def test_an_answer_is_read_in_either_form() -> None:
    values = np.array([[0.25, 0.75]], np.float32)
    plain = {"outputs": [{"name": "p", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.75]}]}
    assert np.array_equal(first_output({}, orjson.dumps(plain)), values)
    tensor = {"name": "p", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    header = orjson.dumps({"outputs": [tensor]})
    said = {"inference-header-content-length": str(len(header))}
    assert np.array_equal(first_output(said, header + values.tobytes()), values)
    with pytest.raises(MessageError, match="no first output"):
        first_output({}, b'{"outputs": []}')


def test_raw_bodies_hold_the_numbers_alone() -> None:
    windows = np.random.default_rng(1).normal(size=(3, 6, 100)).astype(np.float32)
    made = template(windows, "window", "raw", "/v2/models/m/infer", {}, "host:1")
    headers, body = parsed(made.fill(5))
    assert int(headers["content-length"]) == len(body) == windows.nbytes
    assert np.array_equal(np.frombuffer(body, "<f4").reshape(windows.shape), made.inputs(5))
    assert np.array_equal(first_output({"content-type": "application/octet-stream"}, body), made.inputs(5).reshape(-1))


def test_peers_are_compared_with_what_we_did_beside_them_and_who_is_absent_is_named() -> None:
    beside = f"{peers_report.OURS} beside kserve"
    rounds = [
        measured(beside, 1, 32, [4.0] * 90), measured("kserve", 1, 32, [2.0] * 60),
        measured(beside, 1, 1, [4.0] * 9), measured("kserve", 1, 1, [2.0] * 90),
    ]  # fmt: skip
    figures = grouped(rounds)
    line = peers_report.last_line(figures, ["kserve", "ray"])
    assert line == "PEERS over_kserve_b1=1.50 over_kserve_b32=skipped over_ray_b1=skipped over_ray_b32=skipped"
    text = "\n".join(peers_report.table(figures, "a machine", {"ray": "does not install: no wheel"}, 4, "json"))
    assert "- ray: skipped, does not install: no wheel" in text and "| kserve | 1 | 32 | 30.0 |" in text
