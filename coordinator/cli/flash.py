"""`bmoe flash`: from an image and a token to a card that joins by itself at its first boot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmoe.protocol.errors import BmoeError, ConfigError
from coordinator.flash.survey import Progress

if TYPE_CHECKING:
    from coordinator.flash.flash import Wishes

PLAIN_STEPS = 10


def flash(
    board: Annotated[str, typer.Option(help="The board: bmoe boards list.")],
    token: Annotated[str | None, typer.Option(help="Join token: bmoe token create.", envvar="BMOE_JOIN_TOKEN")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token, kept out of the process list.")] = None,
    image: Annotated[Path | None, typer.Option(help="The system's image: .img, .img.xz, .img.zst or .img.gz.")] = None,
    device: Annotated[Path | None, typer.Option(help="The disk to write: an SD card or USB disk.")] = None,
    output: Annotated[Path | None, typer.Option(help="Or the file to write; for a Jetson, the folder.")] = None,
    gateway: Annotated[str | None, typer.Option(help="https://HOST:PORT, where the token's own is not to be.")] = None,
    name: Annotated[str | None, typer.Option(help="The device's name; the token's if it is bound to one.")] = None,
    hostname: Annotated[str | None, typer.Option(help="The host's name; the device's if not given.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Such as Europe/Berlin.")] = None,
    wifi_ssid: Annotated[str | None, typer.Option(help="Name of the Wi-Fi network.")] = None,
    wifi_password: Annotated[str | None, typer.Option(help="Passphrase.", envvar="BMOE_WIFI_PASSWORD")] = None,
    wifi_password_file: Annotated[Path | None, typer.Option(help="File with the passphrase.")] = None,
    wifi_country: Annotated[str | None, typer.Option(help="Country of the radio, such as DE.")] = None,
    ssh_key: Annotated[Path | None, typer.Option(help="Public key that may log in.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of wheels for boards without a package index.")] = None,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 of the image file; else FILE.sha256, if there.")] = None,
    confirm_serial: Annotated[str | None, typer.Option(help="The disk's serial number, instead of typing it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show every change, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write an image to a card, with what its first boot needs to install the agent and join.

    Refuses system, mounted, held, fixed, read-only and too small disks, and wants the disk's serial number typed. Reads
    everything back. On the card are a short-lived token, good for one join, and the CA's digest; no private key.
    """
    from coordinator.boards import load_board
    from coordinator.flash.flash import Wishes

    wishes = Wishes(
        board=load_board(board),
        image=image,
        device=device,
        output=output,
        token=_secret("--token", token, token_file) or "",
        gateway=gateway,
        name=name,
        hostname=hostname,
        timezone=timezone,
        wifi_ssid=wifi_ssid,
        wifi_password=_secret("--wifi-password", wifi_password, wifi_password_file),
        wifi_country=wifi_country,
        ssh_key=ssh_key,
        wheels=wheels,
        sha256=sha256,
        confirm_serial=confirm_serial,
        dry_run=dry_run,
    )
    if not wishes.token:
        raise ConfigError("a card needs a join token: --token or --token-file; bmoe token create --name makes one")
    _run(wishes, as_json)


def _run(wishes: Wishes, as_json: bool) -> None:
    from coordinator.flash.flash import Desk
    from coordinator.flash.flash import flash as run

    say = (lambda line: print(line, file=sys.stderr)) if as_json else print
    prompt = typer.prompt if sys.stdin.isatty() and not as_json else None
    with _progress() as progress:
        desk = Desk(say=say, progress=progress.phase, prompt=prompt)
        try:
            run(wishes, desk)
        except (BmoeError, OSError) as error:
            if as_json:
                print(json.dumps({**desk.facts, "ok": False, "error": str(error)}))
            raise
    if as_json:
        print(json.dumps({**desk.facts, "ok": True}))


def _secret(option: str, given: str | None, file: Path | None) -> str | None:
    if file is None:
        return given
    if given is not None:
        raise ConfigError(f"give {option} or {option}-file, not both")
    try:
        with file.open("rb") as opened:
            return opened.read(4096).decode("utf-8", "replace").strip("\r\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def _progress() -> Bars | Lines:
    return Bars() if sys.stderr.isatty() else Lines(lambda line: print(line, file=sys.stderr))


class Bars:
    """Progress bars on a terminal, with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:7}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._rich = RichProgress(*columns, console=Console(stderr=True))

    def phase(self, name: str) -> Progress:
        """A bar for one phase, begun with its first step."""
        task = self._rich.add_task(name, total=None, start=False)

        def step(done: int, total: int) -> None:
            if not self._rich.live.is_started:
                self._rich.start()
            self._rich.start_task(task)
            self._rich.update(task, completed=done, total=total)
            if done >= total and all(t.finished for t in self._rich.tasks):
                self._rich.stop()  # what is said or asked next has the terminal to itself

        return step

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()


class Lines:
    """A line for each tenth, for logs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def phase(self, name: str) -> Progress:
        """The lines of one phase."""
        told = 0

        def step(done: int, total: int) -> None:
            nonlocal told
            tenth = done * PLAIN_STEPS // max(total, 1)
            if tenth > told:
                told = tenth
                self._say(f"{name} {100 * done // max(total, 1)} % ({done} of {total} bytes)")

        return step

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None
