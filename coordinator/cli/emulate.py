"""`bmoe emulate`: a model on emulated boards, before it meets real ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from bmoe.protocol.errors import InferenceError, InputError
from coordinator.cli.tables import out

if TYPE_CHECKING:
    from coordinator.emulate.trial_run import Finding, Served


def emulate(
    board: Annotated[list[str], typer.Option(help="A board's profile, as rpi4; may be repeated.")],
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz of inputs by name, instead of the golden pairs'.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Leave the fleet's state and logs in this new folder.")] = None,
) -> None:
    """Run a model on emulated boards: every file against this machine; where they agree, the whole in a throwaway fleet.

    Exit status 0 where every board gives, within the manifest's tolerances, what this machine gives, and agreed in
    the fleet's vote; else 1. Speed is not measured: an emulated board is far slower than a real one.
    """
    from bmoe.storage.manifest import load_model
    from coordinator.emulate.board import emulated_profile
    from coordinator.emulate.trial_run import inputs_for, measure, serve
    from coordinator.emulate.workshop import Workshop

    # Before anything is fetched: what cannot be tried at all.
    if keep is not None and keep.exists():
        raise InputError(f"--keep wants a new folder, and {keep} is there")
    for name in board:
        emulated_profile(name)
    inputs_for(model, load_model(model), inputs)
    with tempfile.TemporaryDirectory(prefix="bmoe-emulate-", ignore_cleanup_errors=True) as temporary:
        folder = keep or Path(temporary)
        workshop = Workshop(folder / "boards", typer.echo)
        boards = [workshop.board(name) for name in dict.fromkeys(board)]
        findings = measure(model, boards, inputs, typer.echo)
        out.print(_drift_table(findings))
        _agree([f"{f.board}: {f.part}" for f in findings if not f.agrees])
        served, answer = serve(model, boards, inputs, folder / "fleet", typer.echo)
    out.print(_fleet_table(served))
    typer.echo(f"the fleet's answer is {answer.stage}, {answer.assurance}")
    _agree([f"{s.agent}: in the vote" for s in served if not s.agreed])
    typer.echo("boards and this machine agree")


def _agree(apart: list[str]) -> None:
    if apart:
        raise InferenceError(f"boards and this machine do not agree: {', '.join(dict.fromkeys(apart))}")


def _drift_table(findings: list[Finding]) -> Table:
    table = Table("board", "part", Column("output", overflow="fold"), "bits", "drift", "of range", "allowed", "agrees")
    for f in findings:
        figures = (f"{f.drift.max_abs:.2g}", f"{f.drift.of_range:.2g}", f"{f.epsilon:g}")
        table.add_row(
            f.board,
            f.part,
            f.drift.output,
            "equal" if f.drift.equal else "differs",
            *figures,
            "yes" if f.agrees else "NO",
        )
    return table


def _fleet_table(served: list[Served]) -> Table:
    table = Table("agent", "board, as the gateway sees it", "its outputs in the vote")
    for s in served:
        table.add_row(s.agent, s.board, ", ".join(s.stances))
    return table
