"""The gateway's one typed configuration: flags of `bmoe up`, BMOE_* variables, and gateway.toml, in that order."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from bmoe.protocol.errors import ConfigError


class GatewaySettings(BaseSettings):
    """Every setting of a gateway, with its default. Unknown keys in gateway.toml are refused."""

    model_config = SettingsConfigDict(env_prefix="BMOE_", extra="forbid", frozen=True)

    state: Path = Field(Path("./state"), description="The one directory that everything is kept in.")
    host: str = Field("127.0.0.1", description="Address that agents reach: broker and fleet HTTPS listen here.")
    public_hosts: tuple[str, ...] = Field(
        (), description="Further host names and addresses that agents may dial; they go into the server certificate."
    )
    broker: Literal["nats", "mosquitto"] = Field(
        "nats", description="The agents' broker: nats, which comes with bmoe, or mosquitto. The ledger stays on NATS."
    )
    mosquitto: str = Field(
        "mosquitto", description="The program of Mosquitto, by name or path, where it is the broker."
    )
    mqtt_port: int = Field(
        0, ge=0, le=65535, description="Broker port for agents; 0 takes a free one and remembers it."
    )
    fleet_port: int = Field(0, ge=0, le=65535, description="HTTPS port for joining and fetching; 0 takes a free one.")
    supernodes_port: int = Field(
        0, ge=0, le=65535, description="Port for SuperNodes, used from the first rollout on; 0 takes a free one."
    )
    updates_at_once: int = Field(4, ge=1, le=256, description="Agents that install a release at the same time.")
    api_host: str = Field("127.0.0.1", description="Address that the inference API listens on.")
    api_port: int = Field(0, ge=0, le=65535, description="Port of the inference API; 0 takes a free one.")
    api_tls: Literal["auto", "on", "off"] = Field(
        "auto", description="TLS on the inference API: on, off, or auto: on unless it listens on loopback alone."
    )
    api_certificate: Path | None = Field(
        None, description="Certificate chain (PEM) for the API's TLS; without it, one by the gateway's own CA."
    )
    api_key: Path | None = Field(None, description="Private key (PEM) of `api_certificate`.")
    api_tokens: Literal["auto", "required"] = Field(
        "auto",
        description="Whether clients need a token: required, or auto: once there is one, or beyond loopback.",
    )
    models: tuple[str, ...] = Field(("wearable",), description="Built-in models, or folders with a model.json.")
    repository: str = Field(
        "",
        description="Where the signed repository lies: a folder, or a URL such as s3://bucket/path; `repository/` here.",
    )
    release_assurance: Literal["final", "committed"] = Field(
        "final",
        description="When a release may be used: final, cosigned by a quorum, or committed, entered on the ledger.",
    )
    policy: Literal["referee", "quorum", "full", "single"] = Field(
        "referee", description="Policy for requests that name none: referee, quorum, full or single."
    )
    window_ms: float = Field(
        50.0,
        ge=0,
        le=1000,
        description="How long a call waits at most to share a task, while one of its kind is under way or has just returned.",
    )
    batch_rows: int = Field(128, ge=1, le=1024, description="Most rows in one task.")
    request_rows: int = Field(256, ge=1, le=1024, description="Most rows in one request.")
    body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Largest request body.")
    bodies_bytes: int = Field(
        256 * 1024 * 1024, ge=4096, description="Bodies in work at once, in bytes; half of it for one tenant."
    )
    requests_waiting: int = Field(1024, ge=1, description="Requests in work at once; more are refused with 503.")
    connections_per_address: int = Field(
        256, ge=8, description="Connections to the API that one address may hold (an IPv6 /64 counts as one)."
    )
    task_timeout_ms: int = Field(10_000, ge=50, le=600_000, description="How long an agent has for a task.")
    hedge_min_ms: int = Field(200, ge=1, description="Never ask another agent sooner than this after the first.")
    referee_timeout_ms: int = Field(10_000, ge=50, description="How long a re-execution may take.")
    spot_start: float = Field(
        0.25, gt=0, le=1, description="Chance that the embedded validator executes a verdict again, in a young fleet."
    )
    spot_floor: float = Field(
        0.02, gt=0, le=1, description="Chance that it never falls below, however clean the record."
    )
    promise_ms: int = Field(30_000, ge=1000, description="Deadline promised for the entry of a decided answer.")
    disk_reserve_mb: int = Field(
        64, ge=1, description="Room kept on the disks: with less of it, requests are refused with 503."
    )
    metrics_host: str = Field("127.0.0.1", description="Address that /metrics listens on; it asks for no token.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of /metrics; 0 takes a free one and remembers it.")
    log_format: Literal["json", "text"] = Field(
        "json", description="Form of the logs: json, one object a line, or text, key=value pairs."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
    referee_memory_mb: int = Field(1024, ge=128, description="Memory bound of the referee's and the gate's process.")

    @property
    def dial_host(self) -> str:
        """Where this machine's own processes reach what listens on `host`."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def agents_dial(self) -> str:
        """What agents dial: the first public name, else where we listen, else this machine's name."""
        if self.public_hosts:
            return self.public_hosts[0]
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host

    @property
    def api_dial_host(self) -> str:
        """Where this machine's own tools reach the API."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.api_host, self.api_host)

    @property
    def api_on_loopback(self) -> bool:
        """Whether nobody but this machine can reach the API."""
        return self.api_host in ("localhost", "::1") or self.api_host.startswith("127.")

    @property
    def api_scheme(self) -> str:
        """How the API is spoken to: http or https."""
        return "https" if self.api_tls == "on" or (self.api_tls == "auto" and not self.api_on_loopback) else "http"

    @property
    def api_tokens_required(self) -> bool:
        """Whether a client without a token is refused even while there is no token."""
        return self.api_tokens == "required" or not self.api_on_loopback

    @model_validator(mode="after")
    def _certificate_and_key(self) -> GatewaySettings:
        if (self.api_certificate is None) != (self.api_key is None):
            raise ValueError("api_certificate and api_key go together")
        return self

    @model_validator(mode="after")
    def _room_for_a_body(self) -> GatewaySettings:
        if self.bodies_bytes < 4 * self.body_bytes:  # half is one tenant's, and a compressed body is held twice
            raise ValueError(f"bodies_bytes is at least four times body_bytes, {4 * self.body_bytes}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before the environment, before gateway.toml in the state directory."""
        state = init_settings.init_kwargs.get("state") or os.environ.get("BMOE_STATE") or "./state"  # type: ignore[attr-defined]
        toml = TomlConfigSettingsSource(settings_cls, Path(state) / "gateway.toml")
        return init_settings, env_settings, toml


def load_settings(**overrides: Any) -> GatewaySettings:
    """The settings in force; raises ConfigError with one line a fault."""
    try:
        return GatewaySettings(**{k: v for k, v in overrides.items() if v is not None})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors())
        raise ConfigError(f"settings: {faults}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"settings: gateway.toml cannot be read: {error}") from error
