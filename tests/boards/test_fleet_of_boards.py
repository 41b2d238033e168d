"""Emulated boards in a real fleet beside x86 agents: they enrol, answer, and vote across architectures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sample_models import OUTPUT, SAMPLES, write

from bmoe.protocol.messages import Output, open_message
from bmoe.storage.manifest import load_model
from coordinator.boards import load_board
from coordinator.emulate.board import EmulatedBoard
from coordinator.emulate.compute import compute
from coordinator.emulate.fleet import Fleet

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from ledger_check import check_ledger

BOARDS = ("rpi3", "rpi4", "rpi5")
NATIVE = ("x86-1", "x86-2")
SERVED = {sample.name: sample for sample in SAMPLES if sample.name in ("transcendental-fp32", "cnn-fp32", "cnn-int8")}
ROWS = 8


@pytest.fixture(scope="module")
def mixed(
    emulated_board: Callable[[str], EmulatedBoard], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Fleet, dict[str, Path]]]:
    """Two agents of this machine and three boards, each of an owner of its own; three models of one expert each."""
    root = tmp_path_factory.mktemp("mixed")
    boards = {name: emulated_board(name) for name in BOARDS}
    with Fleet(root / "fleet") as fleet:
        fleet.add_all(dict.fromkeys(NATIVE) | boards)
        files = {}
        for name, sample in SERVED.items():
            (root / name).mkdir()
            files[name] = write(sample, root / name)
            assert fleet.publish(root / name) == name
        fleet.online()
        yield fleet, files


def rows_of(name: str, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"x": draw.standard_normal((ROWS, *SERVED[name].row)).astype(np.float32)}


def asked(fleet: Fleet, name: str, seed: int, policy: str) -> tuple[np.ndarray, str]:
    """The fleet's answer, and the id of its one verdict."""
    with contextlib.closing(fleet.client()) as client:
        answer = client.infer(name, rows_of(name, seed), policy=policy, wait="final")
    assert answer.assurance == "verified" and len(answer.verdicts) == 1
    return answer.outputs[OUTPUT], answer.verdicts[0]


def epsilon_of(fleet: Fleet, name: str) -> float:
    return load_model(fleet.folder / "models" / name).experts[0].outputs[0].epsilon


def test_the_gateway_sees_each_board_as_what_it_is(mixed: tuple[Fleet, dict[str, Path]]) -> None:
    """Its name from the device tree, its memory from /proc/meminfo: both the profile's, neither this machine's."""
    fleet, _ = mixed
    rows = {row["agent"]: row for row in fleet.online()}
    for name in BOARDS:
        assert rows[name]["board"] == load_board(name).device_tree.model
    assert not {rows[name]["board"] for name in NATIVE} & {rows[name]["board"] for name in BOARDS}


@pytest.mark.parametrize("name", SERVED)
def test_a_vote_of_all_spans_the_architectures(mixed: tuple[Fleet, dict[str, Path]], name: str) -> None:
    """Policy full: all five are asked, and whichever value is taken, it is this machine's within the tolerance."""
    fleet, files = mixed
    value, verdict = asked(fleet, name, 1, "full")
    assert fleet.stances(verdict) == dict.fromkeys((*BOARDS, *NATIVE), "agree")
    here = compute("", [(files[name], rows_of(name, 1))])[0][OUTPUT]
    assert np.abs(value - here).max() <= epsilon_of(fleet, name)
    if SERVED[name].int8:
        assert value.tobytes() == here.tobytes()


async def test_every_board_signed_an_output_of_every_verdict_of_all(mixed: tuple[Fleet, dict[str, Path]]) -> None:
    """The whole ledger, recomputed and cosigned, has x86 agents and boards side by side in each full vote."""
    fleet, _ = mixed
    tasks = [bytes.fromhex(asked(fleet, name, 2, "full")[1]) for name in SERVED]
    facts = await check_ledger(fleet.state)
    for task in tasks:
        verdict = facts.verdicts[task]
        authors = {open_message(Output, envelope).header.author for envelope in verdict.outputs}
        assert verdict.outcome == "accepted" and set(verdict.assigned) == authors == {*BOARDS, *NATIVE}


@pytest.mark.parametrize("name", SERVED)
def test_a_referee_and_a_board_agree(mixed: tuple[Fleet, dict[str, Path]], name: str) -> None:
    """Policy referee, often enough that boards are drawn: the referee re-executes on x86, and refutes none of them."""
    fleet, files = mixed
    for seed in range(3, 7):
        value, _ = asked(fleet, name, seed, "referee")
        here = compute("", [(files[name], rows_of(name, seed))])[0][OUTPUT]
        assert np.abs(value - here).max() <= epsilon_of(fleet, name)
    with contextlib.closing(fleet.client()) as client:
        assert [row["agent"] for row in client.fleet() if row["refutations"]] == []


async def test_a_board_that_was_killed_rejoins_by_itself(mixed: tuple[Fleet, dict[str, Path]]) -> None:
    """kill -9 of an emulated agent: started again on its state it is the same member, and answers."""
    fleet, _ = mixed
    fleet.kill("rpi4")
    fleet.offline("rpi4")
    fleet.run("rpi4")
    fleet.online()
    _, verdict = asked(fleet, "cnn-int8", 9, "full")
    facts = await check_ledger(fleet.state)
    assert bytes.fromhex(verdict) in facts.outputs_of("rpi4")
