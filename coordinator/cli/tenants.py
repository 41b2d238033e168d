"""`bmoe tenant` and `bmoe api-token`: who may ask the API, and how much of it. They write one file; no restart is needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from coordinator.api_tokens import AdmissionsFile
from coordinator.cli.tables import out, show
from coordinator.state_layout import StateLayout
from coordinator.tenants import Tenant

tenant_app = typer.Typer(help="Limits of tenants: owners of boards, and whom API tokens name.", no_args_is_help=True)
api_token_app = typer.Typer(help="Bearer tokens with which clients ask the API.", no_args_is_help=True)

State = Annotated[Path, typer.Option(help="The gateway's state directory.", envvar="BMOE_STATE")]
DEFAULT_STATE = Path("./state")


@tenant_app.command("set")
def tenant_set(
    name: Annotated[str, typer.Argument(help="The tenant: a name of a-z 0-9 -.")],
    model: Annotated[list[str] | None, typer.Option(help="Allowed model; may be repeated. Default: all.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second; 0 is without limit.")] = 0.0,
    burst: Annotated[int, typer.Option(min=0, help="Requests at once beyond the rate; 0: a second's worth.")] = 0,
    concurrent: Annotated[int, typer.Option(min=0, help="Requests in work at once; 0 is without limit.")] = 0,
    state: State = DEFAULT_STATE,
) -> None:
    """Set a tenant's limits, all of them anew. They count within a second, for all its tokens and boards together."""
    models = frozenset(model) if model else None
    _file(state).limit(Tenant(name, models, rate, burst, concurrent))
    out.print(f"limits of tenant {name} are set")


@tenant_app.command("list")
def tenant_list(state: State = DEFAULT_STATE) -> None:
    """Tenants with limits; any other has none."""
    show([
        {
            "tenant": t.name, "models": "all" if t.models is None else ", ".join(sorted(t.models)),
            "rate": t.rate or "", "burst": t.burst or "", "concurrent": t.concurrent or "",
        }
        for t in _file(state).read().tenants.values()
    ])  # fmt: skip


@api_token_app.command("create")
def api_token_create(
    tenant: Annotated[str, typer.Option(help="Who asks with it; stands in every verdict and answer made for it.")],
    operator: Annotated[bool, typer.Option(help="It also sees the fleet, the figures and all receipts.")] = False,
    days: Annotated[float, typer.Option(min=0.001, max=3650, help="How long it may be used.")] = 365.0,
    state: State = DEFAULT_STATE,
) -> None:
    """Print a new API token. It is shown once: only its digest is kept. It counts within a second.

    From the first on, nobody is answered without one.
    """
    print(_file(state).create(tenant, operator=operator, days=days))


@api_token_app.command("list")
def api_token_list(state: State = DEFAULT_STATE) -> None:
    """API tokens: ids, tenants and ends."""
    show([
        {
            "id": t.id, "tenant": t.tenant, "operator": "yes" if t.operator else "",
            "created": _day(t.created_ms), "expires": _day(t.expires_ms),
        }
        for t in _file(state).read().tokens
    ])  # fmt: skip


@api_token_app.command("revoke")
def api_token_revoke(
    identity: Annotated[str, typer.Argument(help="The token's id, from the list.")], state: State = DEFAULT_STATE
) -> None:
    """Take an API token back; it counts within a second."""
    _file(state).revoke(identity)
    out.print(f"API token {identity} is revoked")


def _file(state: Path) -> AdmissionsFile:
    return AdmissionsFile(StateLayout(state).api_tokens)


def _day(ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(ms / 1000))
