"""`bmoe release rotate-key|new-key|unsigned|sign|accept`: the keys of a repository, here and elsewhere.

A key that must not lie on the gateway is made on another machine; what it must sign is carried there and back as a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bmoe.protocol.errors import ConfigError, InputError, RefusedError
from bmoe.protocol.files import write_durably

State = Annotated[Path, typer.Option(help="The gateway's state directory.", envvar="BMOE_STATE")]
ToSign = Annotated[
    Path | None, typer.Option(help="Where keys kept elsewhere must sign: write what they must sign to this file.")
]
Drafts = Annotated[Path, typer.Argument(help="The file that --to-sign wrote.")]
DEFAULT_STATE = Path("./state")


def add_key_commands(app: typer.Typer) -> None:
    """Add the commands to those of `bmoe release`."""
    for name, command in (
        ("rotate-key", rotate_key), ("new-key", new_key), ("unsigned", unsigned), ("sign", sign), ("accept", accept)
    ):  # fmt: skip
        app.command(name)(command)


def rotate_key(
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, or owner-NAME.")],
    keys: Annotated[int, typer.Option(min=1, max=16, help="How many keys are made here for the role.")] = 1,
    threshold: Annotated[int, typer.Option(min=1, max=16, help="How many of its keys must sign.")] = 1,
    public_key: Annotated[
        list[Path] | None, typer.Option(help="A key kept elsewhere, by its .pub file, in place of keys made here.")
    ] = None,
    to_sign: ToSign = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Give a role of the repository new keys; what the old ones sign counts no more."""
    from coordinator.cli.admin import Admin

    public = [json_of(path) for path in public_key or ()]
    body = {"role": role, "keys": keys, "threshold": threshold, "public_keys": public, "to_sign": to_sign is not None}
    reply = Admin(state).call("POST", "/v1/admin/repository/keys", body)
    if not kept(to_sign, reply):
        removed = len(reply["removed"])
        typer.echo(f"{role} has {reply['keys']} new keys, {threshold} must sign; {removed} old ones removed")


def new_key(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub gets the public one.")],
) -> None:
    """Make a key to sign with, on the machine on which it is to stay."""
    from bmoe.storage.repository_keys import render_public, write_key

    key = write_key(file)
    public = file.with_name(file.name + ".pub")
    write_durably(public, (json.dumps(render_public(key), indent=1) + "\n").encode())
    typer.echo(f"{file} signs, and is for nobody else to read; take {public} to the gateway: bmoe release rotate-key")


def unsigned(
    to_sign: Annotated[Path, typer.Option(help="Write it to this file.")], state: State = DEFAULT_STATE
) -> None:
    """What will expire and only keys kept elsewhere can renew."""
    from coordinator.cli.admin import Admin

    if not kept(to_sign, Admin(state).call("GET", "/v1/admin/repository/unsigned")):
        typer.echo("nothing waits for a signature from elsewhere")


def sign(
    file: Drafts,
    key: Annotated[list[Path], typer.Option(help="A private key that `bmoe release new-key` made; may be repeated.")],
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
) -> None:
    """Show what a file of drafts would have one sign, and sign it; needs no gateway."""
    from bmoe.storage.repository_drafts import described, sign_drafts
    from bmoe.storage.repository_keys import read_signer

    data = _read(file)
    for line in described(data):
        typer.echo(line)
    if not yes and not typer.confirm("sign this?"):
        raise RefusedError("nothing was signed")
    for path in key:
        data, signed = sign_drafts(data, read_signer(path))
        if not signed:
            raise RefusedError(f"{path} is a key of none of these roles; nothing was signed")
        typer.echo(f"{path} signed {', '.join(signed)}")
    write_durably(file, data)
    typer.echo(f"take {file} to the next who must sign, or back to the gateway: bmoe release accept {file}")


def accept(file: Drafts, state: State = DEFAULT_STATE) -> None:
    """Take what was signed elsewhere into the repository."""
    from coordinator.cli.admin import Admin

    reply = Admin(state).call("POST", "/v1/admin/repository/signed", _read(file))
    typer.echo(f"accepted {', '.join(reply['roles'])}; {len(reply['removed'])} keys sign no more")


def kept(to_sign: Path | None, reply: dict[str, Any]) -> bool:
    """Whether the registrar replies with drafts to be signed elsewhere, which are in the file then."""
    drafts = reply.get("to_sign")
    if not drafts or to_sign is None:
        return False
    write_durably(to_sign, drafts.encode())
    typer.echo(
        f"wrote {to_sign}: where the keys are, bmoe release sign {to_sign} --key KEY; then bmoe release accept {to_sign}"
    )
    return True


def json_of(path: Path) -> Any:
    """What a JSON file says; raises ConfigError, InputError."""
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
