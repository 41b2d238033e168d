"""`bmoe boards`: the board profiles that come with bmoe, and a check of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from coordinator.cli.tables import out

boards_app = typer.Typer(
    help="Board profiles: what is known of a board, for flashing and emulation.", no_args_is_help=True
)


@boards_app.command("list")
def list_boards() -> None:
    """The boards that `bmoe flash --board` and `bmoe emulate --board` know."""
    from coordinator.boards import boards, load_board

    table = Table("board", "what it is", "architecture", "first boot", "providers")
    table.columns[0].no_wrap = True
    for name in boards():
        board = load_board(name)
        providers = ", ".join(p.removesuffix("ExecutionProvider") for p in board.onnxruntime.providers)
        table.add_row(name, board.title, board.arch, ", ".join(board.image.first_boot), providers)
    out.print(table)


@boards_app.command()
def show(name: Annotated[str, typer.Argument(help="The board.")]) -> None:
    """One board's profile as JSON."""
    from coordinator.boards import load_board

    print(json.dumps(load_board(name).model_dump(mode="json"), indent=2))


@boards_app.command()
def check(file: Annotated[Path, typer.Argument(help="A profile, NAME.toml.")]) -> None:
    """Check a profile of your own. Exit status 2 and one line that names file, key, what is expected and found."""
    from coordinator.boards import check_board

    typer.echo(f"{file}: {check_board(file).title}: a valid profile")
