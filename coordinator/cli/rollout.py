"""`bmoe rollout`: bring a published version to the fleet in waves, watch it, stop it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from bmoe.client import Client
from bmoe.protocol.errors import InputError, RefusedError, UnavailableError, UnknownError
from coordinator.cli.tables import out
from coordinator.rollout.health import Limits
from coordinator.rollout.machine import ENDED, UNDER_WAY

rollout_app = typer.Typer(help="New versions brought to the fleet in waves.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Model name.")]
State = Annotated[Path, typer.Option(help="The gateway's state directory.", envvar="BMOE_STATE")]
Url = Annotated[str | None, typer.Option(help="The gateway's API; read from the state directory when not given.")]
Token = Annotated[str | None, typer.Option(help="API token, where the gateway wants one.", envvar="BMOE_API_TOKEN")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of the CA that the gateway's certificate is by.")]
Reason = Annotated[str, typer.Option(help="Why; it is entered on the ledger.")]
DEFAULT_STATE = Path("./state")
FOLLOW_S, AWAY_S = 0.5, 60.0


@rollout_app.command()
def start(
    model: Name,
    version: Annotated[int | None, typer.Option(help="The version; the newest one when not given.")] = None,
    canary: Annotated[
        list[str] | None,
        typer.Option(
            help="The first wave: a number of agents, or name:N, board:TEXT, owner:N, label:TEXT; may be repeated."
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The second wave, as a share above 0 of the fleet.")
    ] = 0.25,
    window: Annotated[
        list[str] | None, typer.Option(help="When waves may begin, as 22:00-04:30 in UTC; may be repeated.")
    ] = None,
    soak: Annotated[float, typer.Option(min=0, help="Seconds for which each wave is watched.")] = 60.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="What stops it, as NAME=NUMBER: " + ", ".join(f.name for f in fields(Limits))),
    ] = None,
    over: Annotated[str, typer.Option(help="auto (Flower where it is, else HTTPS) or https.")] = "auto",
    follow: Annotated[bool, typer.Option(help="Show its progress until it ends.")] = False,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Bring a version to the canaries, then to a share of the fleet, then to all; back by itself when it does harm."""
    numbers = [text for text in canary or () if text.isdigit()]
    plan: dict[str, Any] = {
        "canary": [text for text in canary or () if not text.isdigit()],
        "share": share, "windows": window or [], "soak_s": soak, "over": over, "limits": _limits(limit or []),
    }  # fmt: skip
    if numbers:
        plan["canary_count"] = int(numbers[-1])
    client = _client(url, state, token, ca)
    started = client.start_rollout(model, version, plan)
    out.print(f"rolling out {model} version {started['version']}: rollout {started['rollout']}")
    if follow:
        _follow(client, model)


@rollout_app.command()
def status(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    follow: Annotated[bool, typer.Option(help="Show the progress of one model's rollout until it ends.")] = False,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
    state: State = DEFAULT_STATE,
) -> None:
    """The latest rollout of each model: how far it is, what was seen of it, and why it stopped."""
    client = _client(url, state, token, ca)
    if follow:
        if model is None:
            raise InputError("--follow wants the name of a model")
        return _follow(client, model)
    rows = [row for row in client.rollouts() if model in (None, row["model"])]
    if not rows:
        if model is not None:
            raise UnknownError(f"no version of {model} was ever rolled out: bmoe rollout start {model}")
        out.print("no version of any model was ever rolled out")
        return
    table = Table("model", "version", "stage", "agents", "in use", "seen", "reason, or what it waits for")
    for row in rows:
        facts = (row["model"], str(row["version"]), row["stage"], _bar(row), str(row["in_use"]))
        table.add_row(*map(Text, (*facts, _seen(row), _why(row))))  # boards' words among it: no markup
    out.print(table)
    for line in [*_lines_of_agents(rows), *_lines_of_ends(client.ended_rollouts(), model)]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@rollout_app.command()
def pause(
    model: Name, reason: Reason = "", url: Url = None, token: Token = None, ca: Ca = None, state: State = DEFAULT_STATE
) -> None:
    """Stop where it is: agents that hold the version keep it, and no request is answered by it."""
    _act(model, "pause", reason, _client(url, state, token, ca))


@rollout_app.command()
def resume(
    model: Name, reason: Reason = "", url: Url = None, token: Token = None, ca: Ca = None, state: State = DEFAULT_STATE
) -> None:
    """Go on with the wave that was paused."""
    _act(model, "resume", reason, _client(url, state, token, ca))


@rollout_app.command()
def abort(
    model: Name, reason: Reason = "", url: Url = None, token: Token = None, ca: Ca = None, state: State = DEFAULT_STATE
) -> None:
    """End it: the version in use stays in use."""
    _act(model, "abort", reason, _client(url, state, token, ca))


def progress_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """How many agents in service hold the version of a rollout's row, and how many there are; 0 of 0 once it went back."""
    return len(row.get("holds", ())), row.get("agents", 0)


def _act(model: str, what: str, reason: str, client: Client) -> None:
    done = client.act_on_rollout(model, what, reason)
    out.print(f"the rollout of {model} version {done['version']} is {done['stage']}")


def _client(url: str | None, state: Path, token: str | None, ca: Path | None) -> Client:
    from coordinator.cli.commands import client_of

    return client_of(url, state, token, ca)


def _follow(client: Client, model: str) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[seen]}", markup=False))
    with Progress(*columns, console=out) as progress:
        task = progress.add_task(model, seen="")
        heard = time.monotonic()
        while True:
            try:
                rows = client.rollouts()
            except UnavailableError:  # a gateway that restarts goes on with its rollouts
                if time.monotonic() - heard > AWAY_S:
                    raise
                time.sleep(FOLLOW_S)
                continue
            heard, row = time.monotonic(), next((row for row in rows if row["model"] == model), None)
            if row is None:
                raise UnknownError(f"no version of {model} was ever rolled out: bmoe rollout start {model}")
            done, whole = progress_of(row)
            shown = f"{model} {row['version']}: {row['stage']}, {done} of {whole} agents"
            seen = ", ".join(filter(None, (_seen(row), _why(row))))
            progress.update(task, description=shown, completed=done, total=max(1, whole), seen=seen)
            if row["stage"] in ENDED:
                break
            time.sleep(FOLLOW_S)
    if row["stage"] != "done":
        raise RefusedError(f"{model} {row['version']} is {row['stage']}: {row['reason']}")
    out.print(f"{model} version {row['version']} is in use")


def _why(row: Mapping[str, Any]) -> str:
    waits = f"waits for {row['waits']}" if row.get("waits") else ""
    return row.get("stuck") or row["reason"] or waits


def _lines_of_agents(rows: list[dict[str, Any]]) -> list[str]:
    """Agents that have not got it, or of which something is to be said, a line each."""
    lines = []
    for row in rows:
        found = {**row.get("lacks", {}), **row.get("troubles", {})}
        lines += [f"{row['model']} {row['version']}: {agent}: {what}" for agent, what in sorted(found.items())]
    return lines


def _lines_of_ends(ends: list[dict[str, Any]], model: str | None) -> list[str]:
    """Every rollout that did not end well, a line each."""
    lines = []
    for end in ends:
        if end["stage"] != "done" and model in (None, end["model"]):
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end["at"] / 1000))
            lines.append(f"{when}  {end['model']} {end['version']} {end['stage']}: {end['reason']}")
    return lines


def _bar(row: Mapping[str, Any], width: int = 12) -> str:
    done, whole = progress_of(row)
    if not whole:
        return ""
    full = round(width * done / max(1, whole))
    return f"{'#' * full}{'.' * (width - full)} {done}/{whole}"


def _seen(row: Mapping[str, Any]) -> str:
    if "tasks" not in row or row["stage"] not in UNDER_WAY:
        return ""
    return (
        f"{row['tasks']} tasks, p95 {row['p95_ms']:g} ms (in use {row['p95_ms_in_use']:g}), {row['dissent']} dissents,"
        f" {row['failed']} failed, {row['differing']} of {row['rows']} rows differ"
    )


def _limits(given: list[str]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in (names := [limit.name for limit in fields(Limits)]):
            raise InputError(f"a limit is one of {', '.join(names)}, as NAME=NUMBER, found {text!r}")
        try:
            found[name] = int(number) if name == "tasks" else float(number)
        except ValueError:
            raise InputError(f"a limit is NAME=NUMBER, found {text!r}") from None
    return found
