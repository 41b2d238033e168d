"""Board profiles: the one schema of firmware_configs/boards/*.toml, and who reads them by name.

A profile holds facts of a board that flashing, installing and emulating need. It decides nothing and runs nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import tomllib
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from bmoe.protocol.errors import ConfigError, UnknownError
from bmoe.storage.packaged import packaged

MAX_BYTES = 64 * 1024
Hex = Annotated[str, StringConstraints(pattern=r"^(0x[0-9a-f]{1,4})?$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,+-]{0,63}$")]
Line = Annotated[str, StringConstraints(pattern=r"^[ -~]{0,128}$")]
Absolute = Annotated[str, StringConstraints(pattern=r"^(/[A-Za-z0-9_./-]{1,127})?$")]


class _Part(BaseModel):
    """A table of a profile: what it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Cpuinfo(_Part):
    """What /proc/cpuinfo says of each core; the four identifiers are empty on x86, which has others."""

    cores: int = Field(ge=1, le=256)
    implementer: Hex = ""
    variant: Hex = ""
    part: Hex = ""
    revision: int = Field(0, ge=0, le=255)
    features: tuple[Word, ...] = ()
    board_revision: str = Field("", pattern=r"^([0-9a-f]{6})?$", description="The `Revision` line of a Raspberry Pi.")


class DeviceTree(_Part):
    """/proc/device-tree/model and /compatible, both without their NULs; empty where the board has no device tree."""

    model: Line = ""
    compatible: tuple[Word, ...] = ()


class Image(_Part):
    """What is flashed, and where the first boot finds what was put beside it."""

    families: tuple[Literal["raspberry-pi-os", "ubuntu", "debian", "l4t"], ...] = Field(min_length=1)
    boot_labels: tuple[Word, ...] = Field((), description="Labels of the FAT partition that takes the files.")
    boot_mount: Absolute = Field("/boot/firmware", min_length=2, description="Where the running system mounts it.")
    first_boot: tuple[Literal["firstrun", "cloud-init", "overlay"], ...] = Field(min_length=1)


class Python(_Part):
    """The least Python that the image family brings, as (major, minor)."""

    minimum: tuple[int, int]


class Onnxruntime(_Part):
    """Package and execution providers, the wanted first; what a board lacks falls back to the last."""

    package: Word
    constraint: str = Field("", pattern=r"^[<>=!~0-9., ]{0,60}$", description="A version constraint, as pip takes it.")
    index: Line = Field("", description="A package index of its own, where PyPI has no such wheel.")
    providers: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z]+ExecutionProvider$")], ...]


class Agent(_Part):
    """Settings that go into the board's agent.toml."""

    memory_mb: int = Field(ge=32)
    threads: int = Field(ge=1, le=256)
    queue_limit: int = Field(64, ge=1, le=4096)
    max_sessions: int = Field(16, ge=1, le=1024)
    cache_bytes: int = Field(1 << 30, ge=1 << 20)
    outbox_bytes: int = Field(64 << 20, ge=1 << 20)


class Thermal(_Part):
    """The zone that the agent reports, as the kernel names and numbers it; empty where there is none."""

    zone: Line = ""
    path: Absolute = ""
    throttle_c: int = Field(
        default=0, ge=0, le=120, description="Where the firmware begins to slow down, degrees C; 0: unknown."
    )


class Watchdog(_Part):
    """The hardware watchdog; `timeout_s` is what systemd asks of it and at most `max_s`."""

    device: Absolute = ""
    driver: Line = ""
    max_s: int = Field(default=0, ge=0, le=65535)
    timeout_s: int = Field(default=0, ge=0, le=65535)


class Board(_Part):
    """One board profile."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    title: Line = Field(min_length=1)
    arch: Literal["aarch64", "x86_64"]
    cpu: str = Field(pattern=r"^[a-z0-9-]{0,32}$", description="The -cpu of QEMU that is nearest; empty: none.")
    memory_mb: int = Field(ge=256, description="Memory of the smallest model of this board.")
    systemd: Literal["cpu", "gpu", "sensor"]
    cpuinfo: Cpuinfo
    device_tree: DeviceTree = DeviceTree()
    image: Image
    python: Python
    onnxruntime: Onnxruntime
    agent: Agent
    thermal: Thermal = Thermal()
    watchdog: Watchdog = Watchdog()
    extras: tuple[Literal["cpu-temperature", "throttling", "gpio", "i2c", "tegrastats"], ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Board:
        for holds, what in (
            (self.agent.memory_mb * 2 <= self.memory_mb, "agent.memory_mb is at most half of memory_mb"),
            (self.agent.threads <= self.cpuinfo.cores, "agent.threads is at most cpuinfo.cores"),
            (self.watchdog.timeout_s <= self.watchdog.max_s, "watchdog.timeout_s is at most watchdog.max_s"),
            (bool(self.watchdog.device) == bool(self.watchdog.max_s), "watchdog.device and watchdog.max_s go together"),
            (self.arch != "aarch64" or bool(self.cpuinfo.part), "an aarch64 board names cpuinfo.part"),
            (self.onnxruntime.providers[-1:] == ("CPUExecutionProvider",), "onnxruntime.providers ends with the CPU's"),
            ("l4t" not in self.image.families or self.image.first_boot == ("overlay",), "l4t boots by overlay alone"),
            ("overlay" in self.image.first_boot or bool(self.image.boot_labels), "image.boot_labels names a partition"),
        ):
            if not holds:
                raise ValueError(what)
        return self


def boards() -> list[str]:
    """The names of all profiles that come with bmoe."""
    return sorted(path.stem for path in packaged("firmware_configs", "boards").glob("*.toml"))


def load_board(name: str) -> Board:
    """The profile of that name; raises UnknownError, listing what there is, and ConfigError for a damaged one."""
    known = boards()
    if name not in known:
        raise UnknownError(f"there is no board {name[:40]!r}; there are: {', '.join(known)}")
    return check_board(packaged("firmware_configs", "boards") / f"{name}.toml")


def check_board(path: Path) -> Board:
    """A profile from any file. Raises ConfigError: one line with file, key, what is expected and what was found."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: a profile has at most {MAX_BYTES} bytes, found more")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected TOML in UTF-8: {_one_line(str(error))}") from None
    try:
        board = Board.model_validate(_tuples(table))
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {_one_line(e['msg'])} (found {str(e['input'])[:60]!r})"
            for e in error.errors()[:3]
        ]
        raise ConfigError(f"{path}: {'; '.join(faults)}") from None
    if board.name != path.stem:
        raise ConfigError(f"{path}: name: expected {path.stem!r} as the file is called (found {board.name!r})")
    return board


def _tuples(value: object) -> object:
    """TOML has lists where the schema, being frozen, has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:200]
