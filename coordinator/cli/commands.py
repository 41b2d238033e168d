"""The commands of `bmoe`, each a thin shell around something that can be imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bmoe import __version__
from bmoe.client import Client
from bmoe.protocol.errors import BmoeError, ConfigError, InputError
from coordinator.cli.admin import Admin
from coordinator.cli.boards import boards_app
from coordinator.cli.emulate import emulate
from coordinator.cli.flash import flash
from coordinator.cli.model import model_app
from coordinator.cli.release import release_app
from coordinator.cli.rollout import rollout_app
from coordinator.cli.tables import out, show
from coordinator.cli.tenants import api_token_app, tenant_app
from coordinator.config import GatewaySettings, load_settings
from coordinator.embedded.ports import read_ports
from coordinator.state_layout import StateLayout

app = typer.Typer(
    name="bmoe",
    help="Verified Mixture-of-Experts inference on edge boards that nobody has to trust.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
token_app = typer.Typer(help="One-time tokens with which boards join.", no_args_is_help=True)
device_app = typer.Typer(help="Enrolled devices.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(release_app, name="release")
app.add_typer(rollout_app, name="rollout")
app.add_typer(token_app, name="token")
app.add_typer(api_token_app, name="api-token")
app.add_typer(tenant_app, name="tenant")
app.add_typer(device_app, name="device")
app.add_typer(boards_app, name="boards")
app.command()(flash)
app.command()(emulate)

State = Annotated[Path, typer.Option(help="The gateway's state directory.", envvar="BMOE_STATE")]
Url = Annotated[str | None, typer.Option(help="The gateway's API; read from the state directory when not given.")]
Token = Annotated[str | None, typer.Option(help="API token, where the gateway wants one.", envvar="BMOE_API_TOKEN")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of the CA that the gateway's certificate is by.")]
DEFAULT_STATE = Path("./state")


@app.command()
def up(
    state: State = DEFAULT_STATE,
    host: Annotated[str | None, typer.Option(help="Address that agents reach. Default 127.0.0.1.")] = None,
    api_host: Annotated[str | None, typer.Option(help="Address of the inference API. Default 127.0.0.1.")] = None,
    api_port: Annotated[int | None, typer.Option(help="Port of the inference API; 0 takes a free one.")] = None,
    broker: Annotated[str | None, typer.Option(help="The agents' broker: nats or mosquitto.")] = None,
    mqtt_port: Annotated[int | None, typer.Option(help="Broker port for agents.")] = None,
    fleet_port: Annotated[int | None, typer.Option(help="HTTPS port for joining and fetching.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "--models", help="Built-in model or folder; may be repeated.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Default policy: referee, quorum, full or single.")] = None,
) -> None:
    """Bring a whole gateway up: broker, ledger, registrar, validator, coordinator. Ctrl-C stops it cleanly.

    All state is under --state; a second start on it goes on where the first ended, also after a kill.
    Further settings: `bmoe config`.
    """
    from coordinator.up import run_gateway

    settings = load_settings(
        state=state,
        host=host,
        api_host=api_host,
        api_port=api_port,
        broker=broker,
        mqtt_port=mqtt_port,
        fleet_port=fleet_port,
        models=tuple(model) if model else None,
        policy=policy,
    )
    run_gateway(settings, print)


@app.command()
def config(state: State = DEFAULT_STATE) -> None:
    """Every setting: its value in force, how to set it, and what it is for."""
    settings = load_settings(state=state)
    table = Table("setting", "value", "environment", "meaning")
    for name, field in GatewaySettings.model_fields.items():
        table.add_row(name, str(getattr(settings, name)), f"BMOE_{name.upper()}", field.description or "")
    out.print(table)
    out.print(f"Settings may also stand in {state}/gateway.toml.")


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="Model name.")],
    input_file: Annotated[Path, typer.Argument(help="A .npy (single input), .npz, or JSON infer body; - for stdin.")],
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
    state: State = DEFAULT_STATE,
    policy: Annotated[str | None, typer.Option(help="referee, quorum, full or single.")] = None,
    wait: Annotated[str | None, typer.Option(help="decided, committed or final.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Also write the answer's receipt to this file.")] = None,
) -> None:
    """Ask a model and print the verified answer as JSON."""
    from coordinator.cli.inputs import read_inputs

    client = client_of(url, state, token, ca)
    inputs = read_inputs(input_file, client, model)
    answer = client.infer(model, inputs, policy=policy, wait=wait)
    outputs = {name: array.tolist() for name, array in answer.outputs.items()}
    print(json.dumps({"outputs": outputs, "parameters": answer.parameters}))
    if receipt is not None:
        receipt.write_bytes(client.receipt(answer.request))


@app.command()
def receipt(
    identity: Annotated[str, typer.Argument(help="The request id of an answer, or a verdict id with --verdict.")],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
    verdict: Annotated[bool, typer.Option(help="The id is a verdict's.")] = False,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Fetch a receipt; check it anywhere with `bmoe audit FILE --trust trust.json`."""
    client = client_of(url, state, token, ca)
    file.write_bytes(client.verdict_receipt(identity) if verdict else client.receipt(identity))
    out.print(f"wrote {file}")


@app.command()
def fleet(url: Url = None, token: Token = None, ca: Ca = None, state: State = DEFAULT_STATE) -> None:
    """The fleet: who is online, in what standing."""
    table = Table("agent", "owner", "standing", "online", "clean", "refutations", "board")
    for row in client_of(url, state, token, ca).fleet():
        values = (row["agent"], row["owner"], row["standing"], "yes" if row["online"] else "no")
        table.add_row(*values, str(row["clean"]), str(row["refutations"]), str(row.get("board", "")))
    out.print(table)


@token_app.command("create")
def token_create(
    owner: Annotated[str, typer.Option(help="Who owns the device; replicas are kept with different owners.")],
    name: Annotated[str | None, typer.Option(help="Bind the token to this device name.")] = None,
    batch: Annotated[str, typer.Option(help="Free text kept with the enrolment, such as a production batch.")] = "",
    hours: Annotated[float, typer.Option(min=0.01, max=720, help="How long it may be used.")] = 24.0,
    state: State = DEFAULT_STATE,
) -> None:
    """Print a token for `bmoe-agent join TOKEN`. It enrols one device, once."""
    body = {"name": name, "owner": owner, "batch": batch, "ttl_s": int(hours * 3600)}
    print(Admin(state).call("POST", "/v1/admin/tokens", body)["token"])


@token_app.command("list")
def token_list(state: State = DEFAULT_STATE) -> None:
    """Tokens made, and what became of them."""
    show(Admin(state).call("GET", "/v1/admin/tokens")["tokens"])


@device_app.command("list")
def device_list(state: State = DEFAULT_STATE) -> None:
    """Everything enrolled."""
    show(Admin(state).call("GET", "/v1/admin/devices")["devices"])


@device_app.command("revoke")
def device_revoke(
    name: Annotated[str, typer.Argument(help="The device.")],
    reason: Annotated[str, typer.Option(help="Why; it is entered on the ledger.")],
    state: State = DEFAULT_STATE,
) -> None:
    """Take a device out of service for good: its session is dropped and it can never connect again."""
    done = Admin(state).call("POST", f"/v1/admin/devices/{name}/revoke", {"reason": reason})
    out.print(f"{name} is revoked; sessions ended: {done['sessions_ended']}")


@app.command()
def audit() -> None:
    """Check a receipt offline: bmoe audit FILE --trust trust.json. Needs no gateway and no extra."""
    raise typer.Exit(2)  # handled before this file is imported; listed here for --help


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def api_url(state: Path) -> str:
    """The API of the gateway that runs on a state directory."""
    port = read_ports(state).get("api")
    if port is None:
        raise ConfigError(f"{state} knows of no API port: bring the gateway up first (bmoe up), or give --url")
    host = StateLayout(state).dial("api_host")
    scheme = "https" if StateLayout(state).api_tls() else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def client_of(url: str | None, state: Path, token: str | None, ca: Path | None) -> Client:
    """A client of the gateway at `url`, or of the one on the state directory, which says itself whom to trust."""
    own_ca = StateLayout(state).ca
    given = ca or (own_ca if url is None and own_ca.exists() else None)
    return Client(api_url(state) if url is None else url, token=token, ca=given)


def run() -> int:
    """Run the command line; our own errors are one line on stderr."""
    try:
        app(standalone_mode=True)
    except (InputError, ConfigError) as error:
        print(f"bmoe: {error}", file=sys.stderr)
        return 2
    except BmoeError as error:
        print(f"bmoe: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"bmoe: {error}", file=sys.stderr)
        return 1
    return 0
