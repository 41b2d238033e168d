"""One flash from begin to end: the cheap refusals first, then the image read whole, then the plan, then the writing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError, RefusedError, UnavailableError
from coordinator.boards import Board
from coordinator.flash.disks import Disk, check_again, check_disk, confirm, find_disk
from coordinator.flash.gateway import Standing, ask
from coordinator.flash.overlay import overlay_files, write_overlay
from coordinator.flash.own_wheel import own_wheel
from coordinator.flash.plan import Change, Plan, inspect, make_plan, show_change
from coordinator.flash.seed import (
    Seed,
    check_hostname,
    check_name,
    check_timezone,
    is_loopback,
    is_own,
    make_token,
    make_wifi,
    read_ssh_key,
    read_wheels,
)
from coordinator.flash.source import Source
from coordinator.flash.spool import Spool
from coordinator.flash.survey import Progress, Survey
from coordinator.flash.write import opened, reread_table, write_image


@dataclass(frozen=True)
class Wishes:
    """What the user asked for, unchecked. Exactly one of `device` and `output` is given."""

    board: Board
    image: Path | None
    device: Path | None
    output: Path | None
    token: str
    gateway: str | None = None
    name: str | None = None
    hostname: str | None = None
    timezone: str | None = None
    wifi_ssid: str | None = None
    wifi_password: str | None = None
    wifi_country: str | None = None
    ssh_key: Path | None = None
    wheels: Path | None = None
    sha256: str | None = None
    confirm_serial: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Desk:
    """Where words, questions and progress go. `prompt` is None where nobody can be asked."""

    say: Callable[[str], None]
    progress: Callable[[str], Progress]
    prompt: Callable[[str], str] | None
    root: Path = Path("/")
    clock: Callable[[], float] = time.time
    facts: dict[str, Any] = field(default_factory=dict)


def flash(wishes: Wishes, desk: Desk) -> None:
    """Do it. Raises an error of ours at the first thing that is not right; only `write` touches the target."""
    if (wishes.device is None) == (wishes.output is None):
        raise ConfigError("give the target: --device /dev/sdX, or --output FILE")
    seed = make_seed(wishes, int(desk.clock()))
    if is_loopback(seed.token):
        line = f"the token's gateway is {seed.token.url}, which is every board's own address: give --gateway https://HOST:PORT"
        if wishes.device is not None:
            raise ConfigError(line)
        desk.say(line)
    seed = _asked(seed, wishes, desk)
    desk.facts.update(board=wishes.board.name, name=seed.name, gateway=seed.token.url, dry_run=wishes.dry_run)
    if "l4t" in wishes.board.image.families:
        _overlay(wishes, seed, desk)
        return
    if wishes.image is None:
        raise ConfigError(f"give the image for {wishes.board.title}: --image FILE")
    disk = find_disk(wishes.device, desk.root) if wishes.device else None
    if disk is not None:
        check_disk(disk, 0)
        if not wishes.dry_run and not os.access(desk.root / disk.path[1:], os.W_OK):
            raise RefusedError(f"{disk.path} is not yours to write to: run this as root (sudo)")
        desk.say(disk.describe())
    elif wishes.output is not None and wishes.output.exists():
        raise ConfigError(f"{wishes.output} is there already: nothing is overwritten")
    with Spool() as spool:
        source, found = inspect(wishes.image, wishes.board, spool, wishes.sha256, desk.progress("read"))
        if disk is not None:
            check_disk(disk, found.image_bytes)
        plan = make_plan(found, seed, spool)
    _show(plan, seed, desk, verbose=wishes.dry_run)
    if wishes.dry_run:
        desk.say("nothing was written")
        return
    if disk is not None:
        confirm(disk, _confirmation(disk, wishes.confirm_serial, desk))
        check_again(disk, desk.root, found.image_bytes)
    target = Path(disk.path) if disk else wishes.output
    assert target is not None
    _write(target, disk, source, plan, desk)


def _write(target: Path, disk: Disk | None, source: Source, plan: Plan, desk: Desk) -> None:
    phases = {phase: desk.progress(phase) for phase in ("write", "verify")}
    with opened(target, disk) as handle:
        try:
            done = write_image(handle, source, plan.survey, plan.patches, disk is None, phases)
        except BaseException:
            if disk is not None:
                desk.say(f"{target} is written in part: nothing boots from it until it is flashed anew")
            raise
        if disk is not None:
            reread_table(handle)
    desk.facts.update(target=str(target), written=done.bytes_written, verified=True)
    desk.say(f"{target} is written and read back: {done.image_bytes} bytes, SHA-256 of the image {done.raw_sha256}")


def make_seed(wishes: Wishes, now_s: int) -> Seed:
    """What goes onto the card, each part checked; raises ConfigError and MessageError."""
    name = check_name(wishes.name)
    wheels = read_wheels(wishes.wheels, wishes.board)
    return Seed(
        board=wishes.board,
        token=make_token(wishes.token, wishes.gateway),
        name=name,
        hostname=check_hostname(wishes.hostname, name),
        timezone=check_timezone(wishes.timezone),
        ssh_key=read_ssh_key(wishes.ssh_key),
        wifi=make_wifi(wishes.wifi_ssid, wishes.wifi_password, wishes.wifi_country),
        wheels=wheels,
        own=None if any(map(is_own, wheels)) else own_wheel(),
        issued_s=now_s,
    )


def _asked(seed: Seed, wishes: Wishes, desk: Desk) -> Seed:
    """The seed with the name that the token is bound to. A gateway that cannot be asked now decides when the board joins."""
    try:
        standing: Standing = ask(seed.token, seed.name)
    except UnavailableError as error:
        desk.say(f"the token could not be checked, it will be when the board joins: {error}")
        desk.facts["token_checked"] = False
        return seed
    desk.facts["token_checked"] = True
    hours = (standing.expires_ms / 1000 - desk.clock()) / 3600
    whose = standing.name or seed.name or "any name"
    desk.say(f"the token is good for {hours:.1f} more hours: {whose}, owner {standing.owner}")
    if not standing.name or standing.name == seed.name:
        return seed
    if wishes.name is not None:
        raise RefusedError(f"the token is for {standing.name}, not for {wishes.name}")
    return make_seed_named(seed, wishes, standing.name)


def make_seed_named(seed: Seed, wishes: Wishes, name: str) -> Seed:
    """The same seed for the device `name`."""
    return Seed(**{**vars(seed), "name": name, "hostname": check_hostname(wishes.hostname, name)})


def _overlay(wishes: Wishes, seed: Seed, desk: Desk) -> None:
    """For a board that its maker's program flashes: a folder, and no disk touched."""
    if wishes.image is not None or wishes.output is None:
        raise ConfigError(
            f"{wishes.board.title} is flashed by NVIDIA's own program: give --output DIR for what is laid over its root "
            "file system, and neither --image nor --device"
        )
    files = overlay_files(seed)
    for path, content in sorted(files.items()):
        desk.say(f"new     {path} ({len(content)} bytes)")
    desk.facts["files"] = sorted(files)
    if wishes.dry_run:
        desk.say("nothing was written")
        return
    for made in write_overlay(wishes.output, seed):
        desk.say(f"wrote {made}")
    desk.say(f"next: sudo sh {wishes.output}/apply.sh LINUX_FOR_TEGRA, then NVIDIA's flash.sh")
    desk.say(f"or, on a Jetson that runs already: sudo sh {wishes.output}/install-here.sh")


def _show(plan: Plan, seed: Seed, desk: Desk, verbose: bool) -> None:
    found: Survey = plan.survey
    desk.say(
        f"image: {found.image_bytes} bytes, for {found.processor or 'a processor that nothing in it tells'}, first boot by "
        f"{found.method}, boot partition {found.boot.number} ({found.label})"
        + (", with a block map" if found.bmap else "")
    )
    if found.relabel:
        desk.say(f"changed the label of partition {found.boot.number}, the EFI system partition, to {found.label}")
    if not seed.wheels:
        desk.say(
            "bmoe is on the card, what it needs is not: the board fetches that from a package index (--wheels DIR)"
        )
    desk.facts.update(
        image_bytes=found.image_bytes,
        image_sha256=found.raw_sha256,
        file_sha256=found.file_sha256,
        method=found.method,
        files=[_fact(change) for change in plan.changes],
        bytes_changed=sum(len(data) for _, data in plan.patches),
    )
    for change in plan.changes:
        for line in show_change(change) if verbose else show_change(change)[:1]:
            desk.say(line)


def _fact(change: Change) -> dict[str, Any]:
    return {"path": change.path, "bytes": len(change.after), "new": change.before is None}


def _confirmation(disk: Disk, given: str | None, desk: Desk) -> str:
    if given is not None:
        return given
    if desk.prompt is None:
        raise ConfigError(f"everything on {disk.path} will be lost: confirm with --confirm-serial {disk.identity}")
    return desk.prompt(f"Everything on {disk.describe()} will be lost. Type {disk.identity} to go on")
