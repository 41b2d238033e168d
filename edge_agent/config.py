"""The agent's one typed configuration: flags, then BMOE_AGENT_* variables, then agent.toml in the state directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from bmoe.protocol.errors import ConfigError

SYSTEM_STATE = Path("/var/lib/bmoe-agent")
MIB = 1 << 20
Provider = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z]{1,40}ExecutionProvider$")]


def default_state() -> Path:
    """/var/lib/bmoe-agent where that can be written, else a folder of the user's own."""
    # An installed agent's is a link into a folder that others cannot even look into.
    nearest = SYSTEM_STATE if os.path.lexists(SYSTEM_STATE) else SYSTEM_STATE.parent
    if os.access(nearest, os.W_OK | os.X_OK):
        return SYSTEM_STATE
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "bmoe-agent"


class AgentSettings(BaseSettings):
    """Every setting of an agent, with its default. Unknown keys are refused."""

    model_config = SettingsConfigDict(env_prefix="BMOE_AGENT_", extra="forbid", frozen=True)

    state: Path = Field(default_factory=default_state, description="The one directory that the agent writes to.")
    config: Path | None = Field(None, description="A TOML file with these settings; default: agent.toml in `state`.")
    queue_limit: int = Field(64, ge=1, le=4096, description="Tasks in work at once; more are refused as busy.")
    queue_bytes: int = Field(32 * MIB, ge=MIB, description="Bytes of the tasks in work together.")
    payload_bytes: int = Field(8 * MIB, ge=1024, le=64 * MIB, description="Largest task message.")
    memory_mb: int = Field(512, ge=32, description="Memory that experts and their tensors may use together.")
    threads: int = Field(1, ge=1, le=256, description="Threads that compute one task.")
    providers: tuple[Provider, ...] = Field(
        ("CPUExecutionProvider",),
        min_length=1,
        description="Execution providers of onnxruntime, the wanted first; what is not there is left out, the CPU's last.",
    )
    max_sessions: int = Field(16, ge=1, le=1024, description="Experts kept loaded.")
    nice: int = Field(5, ge=0, le=19, description="Niceness of the process that computes.")
    expert_bytes: int = Field(256 * MIB, ge=1024, description="Largest expert file.")
    cache_bytes: int = Field(1024 * MIB, ge=1024, description="Expert files kept on disk, the longest unused go first.")
    release_assurance: str = Field(
        "final",
        pattern="^(final|committed)$",
        description="When an expert may be used: final, cosigned by a quorum of validators, or committed, on the ledger.",
    )
    outbox_count: int = Field(8192, ge=1, description="Signed outputs kept to be sent again.")
    outbox_bytes: int = Field(64 * MIB, ge=MIB, description="Bytes of the signed outputs kept.")
    outbox_age_s: int = Field(
        604_800,
        ge=60,
        description="How long after its deadline an output that the gateway has not got is kept and sent.",
    )
    complaint_bytes: int = Field(16 * MIB, ge=0, description="Bytes of task messages kept until their notice comes.")
    complaints_per_minute: int = Field(6, ge=0, le=600, description="Complaints to the validators; 0 sends none.")
    clock_tolerance_ms: int = Field(2000, ge=0, le=600_000, description="How far our clock may be ahead.")
    notice_wait_s: int = Field(30, ge=1, description="How long after its deadline a task's notice may take.")
    health_every_s: float = Field(10.0, gt=0, le=3600, description="Pause between health messages.")
    keepalive_s: int = Field(20, ge=2, le=600, description="MQTT keepalive.")
    updates: str = Field(
        "auto",
        pattern="^(auto|https|off)$",
        description="How releases of a rollout come: auto (by Flower where it is installed, else HTTPS), https, or off.",
    )
    source_local: bool = Field(
        False, description="A source is answered by this board alone, unverified, where the gateway cannot be asked."
    )
    source_reply_s: float = Field(10.0, gt=0, le=600, description="How long a source's request waits for the gateway.")
    source_poll_s: float = Field(0.25, gt=0, le=60, description="Pause between looks into a watched folder.")
    source_file_bytes: int = Field(8 * MIB, ge=1, description="Largest file that is taken from a watched folder.")
    source_queue_count: int = Field(4096, ge=1, description="Local answers kept on disk to be verified.")
    source_queue_bytes: int = Field(64 * MIB, ge=1024, description="Bytes of the local answers kept.")
    temperature_file: str = Field(
        "/sys/class/thermal/thermal_zone0/temp",
        pattern="^/",
        description="Where the kernel tells the board's temperature.",
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="Form of the log: text, or json.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="Least severity logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before the environment, before the configuration file."""
        given: dict[str, Any] = init_settings.init_kwargs  # type: ignore[attr-defined]
        state = given.get("state") or os.environ.get("BMOE_AGENT_STATE") or default_state()
        file = given.get("config") or os.environ.get("BMOE_AGENT_CONFIG") or Path(state) / "agent.toml"
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(file))


def load_settings(**flags: Any) -> AgentSettings:
    """The settings in force; flags that are None count as not given. Raises ConfigError, naming each fault."""
    given = {key: value for key, value in flags.items() if value is not None}
    named = given.get("config") or os.environ.get("BMOE_AGENT_CONFIG")
    if named and not Path(named).is_file():
        raise ConfigError(f"there is no configuration file {named}")
    try:
        return AgentSettings(**given)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
        raise ConfigError(f"settings: {'; '.join(faults)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"settings: the configuration file cannot be read: {error}") from None
