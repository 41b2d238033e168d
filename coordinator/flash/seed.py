"""What is put on a card for its first boot, as checked values: token, name, network, key, wheels. Pure but for reading.

Only what may be lost with the card: the token is short-lived and good for one join, the Wi-Fi key is no passphrase.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.join_token import JoinToken, check_url, parse_token
from bmoe.protocol.schema import is_name
from coordinator.boards import Board

WHEELS_BYTES = 200 << 20
WHEELS_MAX = 64
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TIMEZONE = re.compile(r"[A-Za-z]+(/[A-Za-z0-9_+-]+){0,2}")
_SSH_KEY = re.compile(
    r"(ssh-(ed25519|rsa)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r" [A-Za-z0-9+/=]+( [ -~]*)?"
)
_WHEEL = re.compile(
    r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.!+]+)(-\d[A-Za-z0-9_.]*)?-[^-]+-[^-]+-(?P<platform>[^-]+)\.whl"
)


@dataclass(frozen=True)
class Wifi:
    """One network. `psk` is the 256-bit key of WPA2 in hexadecimal, "" for an open network."""

    ssid: str
    psk: str
    country: str


@dataclass(frozen=True)
class Seed:
    """All of it. `token` is what the board will join with; `issued_s` is now, in s since 1970. `own` is name and content of
    bmoe's own wheel, None where it is among `wheels`."""

    board: Board
    token: JoinToken
    name: str
    hostname: str
    timezone: str
    ssh_key: str
    wifi: Wifi | None
    wheels: tuple[Path, ...]
    own: tuple[str, bytes] | None
    issued_s: int


def make_token(text: str, gateway: str | None) -> JoinToken:
    """The token, dialling `gateway` where that is given. Raises MessageError for a damaged one."""
    token = parse_token(text)
    if gateway is None:
        return token
    return JoinToken(check_url(gateway), token.token, token.secret, token.pin)


def is_loopback(token: JoinToken) -> bool:
    """Whether the token's gateway is an address that every board has itself."""
    host = urlsplit(token.url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_wifi(ssid: str | None, password: str | None, country: str | None) -> Wifi | None:
    """The network, its passphrase made the key that it stands for (IEEE 802.11i, PBKDF2). Raises ConfigError."""
    if ssid is None:
        if password is not None or country is not None:
            raise ConfigError("--wifi-password and --wifi-country go with --wifi-ssid")
        return None
    raw = ssid.encode()
    if not 1 <= len(raw) <= 32 or not ssid.isprintable():
        raise ConfigError(f"a Wi-Fi name has 1..32 bytes and no control characters, found {ssid[:60]!r}")
    if country is None or not re.fullmatch(r"[A-Z]{2}", country):
        raise ConfigError("--wifi-country takes two capital letters, such as DE: without it the radio stays off")
    if password is None or password == "":
        return Wifi(ssid, "", country)
    if re.fullmatch(r"[0-9a-fA-F]{64}", password):
        return Wifi(ssid, password.lower(), country)
    if not 8 <= len(password) <= 63 or not password.isascii() or not password.isprintable():
        raise ConfigError("a Wi-Fi passphrase has 8..63 ASCII characters")  # which is not repeated here
    return Wifi(ssid, hashlib.pbkdf2_hmac("sha1", password.encode(), raw, 4096, 32).hex(), country)


def check_name(name: str | None) -> str:
    """A device's name, "" for none; raises ConfigError."""
    if name and not is_name(name):
        raise ConfigError(f"a device's name has 1..64 characters a-z 0-9 and inner '-', found {name[:80]!r}")
    return name or ""


def check_hostname(hostname: str | None, name: str) -> str:
    """The host's name, the device's where none is given; raises ConfigError."""
    if hostname and not _HOSTNAME.fullmatch(hostname):
        raise ConfigError(f"a host's name has 1..63 characters a-z 0-9 and inner '-', found {hostname[:80]!r}")
    return hostname or (name if _HOSTNAME.fullmatch(name) else "")


def check_timezone(timezone: str | None) -> str:
    """A timezone's name, "" for none; raises ConfigError."""
    if timezone and not _TIMEZONE.fullmatch(timezone):
        raise ConfigError(f"a timezone is spelled like Europe/Berlin, found {timezone[:80]!r}")
    # None are available on a machine that keeps no list of them.
    if timezone and (known := zoneinfo.available_timezones()) and timezone not in known:
        raise ConfigError(f"there is no timezone {timezone[:80]!r}: one is spelled like Europe/Berlin")
    return timezone or ""


def read_ssh_key(file: Path | None) -> str:
    """The one public key of a file, "" for none; raises ConfigError, at a private key above all."""
    if file is None:
        return ""
    try:
        with file.open("rb") as opened:
            text = opened.read(16 * 1024).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if "PRIVATE KEY" in text:
        raise ConfigError(f"{file} is a private key: give the public one, {file.name}.pub")
    if not _SSH_KEY.fullmatch(text):
        raise ConfigError(f"{file}: expected one public key as ssh-keygen writes it, found {text[:40]!r}")
    return text


def read_wheels(folder: Path | None, board: Board) -> tuple[Path, ...]:
    """The wheels of a folder. Raises ConfigError where there is none, or one is for another processor."""
    if folder is None:
        return ()
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ConfigError(f"{folder} has no wheels: docs/boards.md tells how they are fetched")
    if len(ours := [wheel.name for wheel in wheels if is_own(wheel)]) > 1:
        raise ConfigError(f"{folder} has more than one wheel of bmoe: {', '.join(ours)}")
    _check_platforms(wheels, board)
    total = sum(wheel.stat().st_size for wheel in wheels)
    if total > WHEELS_BYTES or len(wheels) > WHEELS_MAX:
        raise ConfigError(
            f"{folder} has {len(wheels)} wheels of {total >> 20} MiB together; at most {WHEELS_MAX} of "
            f"{WHEELS_BYTES >> 20} MiB go onto a boot partition"
        )
    return tuple(wheels)


def is_own(wheel: Path) -> bool:
    """Whether a wheel is bmoe's own."""
    return wheel.name.lower().startswith("bmoe-")


def _check_platforms(wheels: Sequence[Path], board: Board) -> None:
    for wheel in wheels:
        match = _WHEEL.fullmatch(wheel.name)
        if match is None:
            raise ConfigError(f"{wheel} is not named as a wheel is")
        platforms = match["platform"].split(".")
        if not any(p == "any" or (p.startswith(("manylinux", "linux")) and p.endswith(board.arch)) for p in platforms):
            raise ConfigError(
                f"{wheel.name} is not for {board.title}, which runs {board.arch}: "
                f"pip download --platform manylinux_2_28_{board.arch} --only-binary :all:"
            )
