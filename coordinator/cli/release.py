"""`bmoe release`: versions of models in the signed repository and on the ledger. Published, listed, shown, withdrawn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bmoe.protocol.errors import InputError, ModelError
from bmoe.protocol.text import plain
from coordinator.cli.release_keys import DEFAULT_STATE, State, ToSign, add_key_commands, kept

release_app = typer.Typer(help="Signed releases of models: publish, list, show, withdraw; and their keys.",
                          no_args_is_help=True)  # fmt: skip
add_key_commands(release_app)
Name = Annotated[str, typer.Argument(help="The model's name.")]
Version = Annotated[int, typer.Argument(min=1, help="The number of its version.")]


@release_app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    owner: Annotated[str, typer.Option(help="Who owns the model; its role signs the release.")] = "operator",
    origin: Annotated[
        Path | None, typer.Option(help="An in-toto statement of where it comes from, or facts to make one of.")
    ] = None,
    serve: Annotated[bool, typer.Option(help="Serve it at once to all, without a rollout.")] = False,
    to_sign: ToSign = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Check a model, put it into the repository, and enter it on the ledger. A version that follows another one waits
    for its rollout."""
    from coordinator.cli.model import checked
    from coordinator.models.publish import publish as send

    if faults := asyncio.run(checked(folder)):
        raise ModelError(f"{folder} was not published: {faults} fault{'s' if faults > 1 else ''}, see above")
    reply = send(state, folder, owner, hold=not serve, origin=origin, to_sign=to_sign is not None)
    if kept(to_sign, reply):
        typer.echo(f"then publish {folder} again")
        return
    name = f"{reply['model']} version {reply['version']}"
    if not reply["position"]:
        typer.echo(f"{name} is published already; nothing changed")
        return
    typer.echo(f"published {name} at ledger position {reply['position']}")
    if not reply["final"]:
        typer.echo("it is not final yet: boards take it once a quorum of validators has cosigned it")
    if reply["held"]:
        typer.echo(f"version {reply['version']} waits for its rollout: bmoe rollout start {reply['model']}")


@release_app.command("list")
def list_releases(state: State = DEFAULT_STATE) -> None:
    """Every version in the repository, its owner, and where it stands."""
    from coordinator.cli.admin import Admin
    from coordinator.cli.tables import show as table

    found = Admin(state).call("GET", "/v1/admin/releases")["releases"]
    table([{key: row[key] for key in ("model", "version", "owner", "state")} for row in found])


@release_app.command()
def show(
    model: Name,
    version: Version,
    origin: Annotated[bool, typer.Option(help="Print the statement of origin, and nothing else.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Parts, owner, keys, expiry and origin of a version."""
    from coordinator.cli.admin import Admin

    found = Admin(state).call("GET", f"/v1/admin/releases/{_name(model)}/{version}")
    if origin:
        typer.echo(json.dumps(found["origin_statement"], indent=1))
        return
    for line in _lines(found):
        typer.echo(line)


@release_app.command()
def withdraw(
    model: Name,
    version: Version,
    reason: Annotated[str, typer.Option(help="Why; it stands on the ledger for good.")],
    to_sign: ToSign = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Take a version back, for good: it is not served any more, and no board fetches what only it consists of."""
    from coordinator.cli.admin import Admin

    body = {"model": _name(model), "version": version, "reason": reason, "to_sign": to_sign is not None}
    reply = Admin(state).call("POST", "/v1/admin/withdrawals", body)
    if kept(to_sign, reply):
        typer.echo(
            "the ledger has the withdrawal, and the gateway goes by it; boards that ask the repository do not yet"
        )
        return
    served = f"version {reply['served']} is in use" if reply["served"] else "no version is in use any more"
    typer.echo(f"withdrew {model} version {version} and {len(reply['parts'])} of its parts; {served}")


@release_app.command()
def prune(
    days: Annotated[int, typer.Option(min=0, help="How long ago a version must have been withdrawn.")] = 90,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Remove files that only versions withdrawn long ago have, or none. Old verdicts of theirs cannot be run again then."""
    from coordinator.cli.admin import Admin

    found = Admin(state).call("POST", "/v1/admin/blobs/prune", {"days": days, "dry_run": dry_run})
    for digest in found["blobs"]:
        typer.echo(digest)
    typer.echo(f"{'would remove' if dry_run else 'removed'} {len(found['blobs'])} files, {found['bytes']} bytes")


def _lines(found: dict[str, Any]) -> list[str]:
    built = _object(_object(found["origin_statement"].get("predicate")).get("buildDefinition"))
    sources = built.get("resolvedDependencies")
    origin = "; ".join(map(_source, sources if isinstance(sources, list) else ()))
    lines = [
        f"{found['model']} version {found['version']}: {found['state']}, "
        f"{'final on the ledger' if found['final'] else 'not final on the ledger'}",
        f"owner     {found['owner']}, {found['threshold']} of {found['keys']} keys sign",
        f"manifest  {found['manifest']}",
        *(f"{part['name']:<9} {part['sha256']}  {part['bytes']} bytes" for part in found["parts"]),
        f"expiry    {', '.join(f'{role} {when}' for role, when in found['expires'].items())}",
        f"origin    {found['origin']}",
        f"made from {origin or 'nothing is stated but the files themselves'}",
    ]
    lines += [f"{key:<9} {json.dumps(value)}" for key, value in _object(built.get("internalParameters")).items()]
    return [plain(line, 2000) for line in lines]  # a statement of origin is a stranger's text


def _source(source: Any) -> str:
    source = _object(source)
    digest = next(iter(_object(source.get("digest")).values()), "")
    return f"{source.get('name') or source.get('uri') or '?'} {str(digest)[:16]}".strip()


def _object(value: Any) -> dict[str, Any]:
    """A part of a foreign statement, which may be anything."""
    return value if isinstance(value, dict) else {}


def _name(model: str) -> str:
    from bmoe.protocol.schema import is_name

    if not is_name(model):
        raise InputError(f"a model's name has 1..64 characters a-z 0-9 and inner '-', found {model[:64]!r}")
    return model
