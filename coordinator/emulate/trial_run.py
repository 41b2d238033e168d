"""What `bmoe emulate` does: each file of a model on this machine and on boards, then the whole model through a fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmoe.client import Answer
from bmoe.protocol.errors import InputError
from bmoe.storage.golden import read_arrays, read_golden
from bmoe.storage.manifest import Expert, Model, load_model, read_part
from coordinator.emulate.board import EmulatedBoard
from coordinator.emulate.cache import Say
from coordinator.emulate.compute import Arrays, compute
from coordinator.emulate.drift import Drift, compare
from coordinator.emulate.fleet import Fleet

NATIVE = "this-machine"


@dataclass(frozen=True)
class Finding:
    """One output of one file on one board: how far from this machine's, and whether a vote takes the two as equal."""

    part: str
    board: str
    drift: Drift
    epsilon: float

    @property
    def agrees(self) -> bool:
        """As voting judges: within epsilon, and integers equal."""
        return self.drift.max_abs <= self.epsilon if self.epsilon else self.drift.equal


@dataclass(frozen=True)
class Served:
    """One agent after the fleet's answer: what the gateway takes it for, and how its output of each verdict stood."""

    agent: str
    board: str
    stances: tuple[str, ...]

    @property
    def agreed(self) -> bool:
        """Whether each verdict has an output of it that agrees."""
        return bool(self.stances) and set(self.stances) == {"agree"}


def inputs_for(folder: Path, model: Model, given: Path | None) -> dict[str, Arrays]:
    """The inputs of each part: those given, else its golden pair's. Raises InputError where there are none."""
    parts = parts_of(model)
    if given is not None:
        try:
            arrays = read_arrays(given.read_bytes())
        except OSError as error:
            raise InputError(f"{given}: cannot be read: {error.strerror}") from None
        return {part.name: {spec.name: _named(arrays, spec.name, given) for spec in part.inputs} for part in parts}
    without = [part.name for part in parts if part.golden is None]
    if without:
        raise InputError(f"{', '.join(without)} of {folder}: no golden pair; give inputs (--inputs FILE.npz)")
    return {part.name: read_golden(read_part(folder, part.golden))[0] for part in parts if part.golden}


def parts_of(model: Model) -> list[Expert]:
    """Gate and experts."""
    return [*([model.gate] if model.gate else []), *model.experts]


def measure(folder: Path, boards: Sequence[EmulatedBoard], given: Path | None, say: Say) -> list[Finding]:
    """Every file of a model on every board against this machine. Raises BmoeError."""
    model = load_model(folder)
    parts, inputs = parts_of(model), inputs_for(folder, model, given)
    for part in parts:
        read_part(folder, part)  # what is measured is what the manifest says
    jobs = [(folder / part.file, inputs[part.name]) for part in parts]
    here = compute("", jobs)
    findings = []
    for board in boards:
        say(f"{board.name}: running {len(jobs)} files")
        for part, native, emulated in zip(parts, here, compute(str(board.python), jobs), strict=True):
            epsilons = {spec.name: spec.epsilon for spec in part.outputs}
            findings += [
                Finding(part.name, board.name, drift, epsilons[drift.output]) for drift in compare(native, emulated)
            ]
    return findings


def serve(
    folder: Path, boards: Sequence[EmulatedBoard], given: Path | None, workplace: Path, say: Say
) -> tuple[list[Served], Answer]:
    """The model through a throwaway gateway with an agent of this machine and one of each board, policy full.

    Raises UnavailableError where the fleet does not come up or does not answer.
    """
    model = load_model(folder)
    inputs = inputs_for(folder, model, given)[model.experts[0].name]
    with Fleet(workplace, [folder]) as fleet:
        say("gateway is up; boards join")
        fleet.add_all({NATIVE: None, **{board.name: board for board in boards}})
        fleet.online()
        say("all are online")
        with contextlib.closing(fleet.client()) as client:
            answer = client.infer(model.name, inputs, policy="full", wait="final")
        stances = [fleet.stances(verdict) for verdict in answer.verdicts]
        rows = fleet.online()
    served = [
        Served(row["agent"], str(row["board"]), tuple(each.get(row["agent"], "silent") for each in stances))
        for row in rows
    ]
    return served, answer


def _named(arrays: Arrays, name: str, given: Path) -> np.ndarray:
    if name not in arrays:
        raise InputError(f"{given} holds no array {name!r}; there are: {', '.join(arrays) or 'none'}")
    return arrays[name]
