"""`bmoe model`: bring your own model. Its manifest written, the model checked, the model published."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bmoe.protocol.errors import InputError, ModelError
from bmoe.protocol.files import write_durably
from bmoe.storage.manifest import MANIFEST_NAME, Model, render_manifest

model_app = typer.Typer(help="Bring your own model: any ONNX gate and experts.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The model's folder.")]
State = Annotated[Path, typer.Option(help="The gateway's state directory.", envvar="BMOE_STATE")]
DEFAULT_STATE = Path("./state")


@model_app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of the model; that of the folder when not given.")] = "",
    gate: Annotated[str, typer.Option(help="The gate's file; gate.onnx when not given, if it is there.")] = "",
    top_k: Annotated[int, typer.Option(min=0, help="How many experts answer for a row; 2 when not given.")] = 0,
    shape: Annotated[list[str] | None, typer.Option(help="Sizes to try an input with: NAME=4,3,224,224.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="An .npz of real inputs, by name, for golden pairs.")] = None,
    force: Annotated[bool, typer.Option(help="Write model.json anew; what its owner wrote is kept.")] = False,
) -> None:
    """Write model.json from the ONNX files in a folder: gate.onnx is the gate, every other file an expert."""
    from coordinator.models.draft import PLACEHOLDER, Wishes, draft
    from coordinator.models.trial import Lab

    if (folder / MANIFEST_NAME).exists() and not force:
        raise InputError(f"{folder / MANIFEST_NAME} is there already; --force writes it anew")
    wishes = Wishes(name, gate, top_k, dict(map(_shape, shape or ())), inputs)

    async def write() -> Model:
        async with Lab() as lab:
            return await draft(folder, wishes, typer.echo, lab)

    made = asyncio.run(write())
    typer.echo(f"wrote {folder / MANIFEST_NAME}: {made.name} version {made.version}, {len(made.experts)} experts")
    if made.licence.startswith(PLACEHOLDER):
        typer.echo("now fill in licence and description, and labels if there are any; then: bmoe model check")


@model_app.command()
def check(folder: Folder) -> None:
    """Run everything that could make a model unfit to be served. Exit status 2 and one line for each fault."""
    if faults := asyncio.run(checked(folder)):
        raise ModelError(f"{folder} cannot be served as it is: {faults} fault{'s' if faults > 1 else ''}, see above")
    typer.echo("can be served")


@model_app.command()
def publish(
    folder: Folder,
    owner: Annotated[str, typer.Option(help="Who owns the model.")] = "operator",
    bump: Annotated[bool, typer.Option(help="If need be, first write the next version into model.json.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Check a model, then send it to the running gateway, which serves it at once."""
    from coordinator.models.check import read_manifest
    from coordinator.models.publish import publish as send
    from coordinator.models.publish import published_version

    if faults := asyncio.run(checked(folder)):
        raise ModelError(f"{folder} was not published: {faults} fault{'s' if faults > 1 else ''}, see above")
    model, data = read_manifest(folder)
    served, digest = published_version(state, model.name)
    if bump and served >= model.version and digest != _digest(data):
        model = replace(model, version=served + 1)
        write_durably(folder / MANIFEST_NAME, render_manifest(model))
    reply = send(state, folder, owner)
    if reply["position"]:
        typer.echo(f"published {model.name} version {model.version}; it is served now")
    else:
        typer.echo(f"{model.name} version {model.version} is published already; nothing changed")


@model_app.command("list")
def list_models(state: State = DEFAULT_STATE) -> None:
    """The models that the gateway serves."""
    from coordinator.models.publish import served_models

    for model in served_models(state):
        typer.echo(f"{model['name']} version {model['version']}, {model['experts']} experts")


async def checked(folder: Path) -> int:
    """Print every finding; how many were bad."""
    from coordinator.models.check import examine
    from coordinator.models.trial import Lab

    faults = 0
    async with Lab() as lab:
        async for finding in examine(folder, lab):
            typer.echo(f"{'ok   ' if finding.good else 'FAULT'} {finding.subject}: {finding.text}")
            faults += not finding.good
    return faults


def _digest(data: bytes) -> str:
    from bmoe.storage.manifest import manifest_digest

    return manifest_digest(data).hex()


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        dims = tuple(int(size) for size in sizes.split(",") if size)
    except ValueError:
        dims = (-1,)
    if not name or any(not 0 < dim < 1 << 31 for dim in dims):
        raise InputError(f"--shape takes NAME=4,10 with sizes above 0, got {text!r}")
    return name, dims
