"""Whether this board's clock can be right. A board without a battery begins in 1970, or where it was switched off.

Two witnesses, neither of which sets the clock: the floor, a time that has certainly passed (when the card was written, and
what we saved last), and the gateway's own `Date` over TLS that its pinned CA vouches for. Validity dates of certificates are
left out of that one question alone, since they are what a wrong clock cannot judge: whoever holds an expired key of the
gateway could make a board wait, and nothing else.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from pathlib import Path

from bmoe.protocol.errors import MessageError, UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.protocol.tls import mutual_tls
from edge_agent.fleet import FleetClient

# No message is under way for so long: what differs by more is a clock's doing.
OFF_S = 60.0
LATEST_S = 253_402_300_799  # the end of the year 9999: what is later is damage, and has no date that could be shown
SAVE_EVERY_S = 3600.0
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python's ssl has no name for it


class ClockError(UnavailableError):
    """This board's clock is wrong; it may be set at any moment."""


def now_s() -> float:
    """This board's clock, in seconds since 1970."""
    return time.time()


def floor_file(state: Path) -> Path:
    """The file that holds the time (seconds since 1970) that has certainly passed."""
    return state / "clock"


def floor_s(state: Path) -> int:
    """A time that has passed, in seconds since 1970; 0 where none is known."""
    try:
        text = floor_file(state).read_bytes()[:20].strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) <= LATEST_S else 0


def save(state: Path, seconds: float | None = None) -> None:
    """Keep a time, by default now, as one that has passed. Raises OSError."""
    write_durably(floor_file(state), b"%d\n" % int(now_s() if seconds is None else seconds))


def check_floor(state: Path) -> None:
    """Raise ClockError while the clock is before a time that has passed."""
    floor = floor_s(state)
    if now_s() < floor:
        raise ClockError(f"this board's clock says {_said(now_s())}, and {_said(floor)} has passed")


def check_gateway(url: str, ca: Path) -> None:
    """Raise ClockError when the gateway's clock says another time, UnavailableError when it cannot be asked."""
    theirs = gateway_s(url, ca)
    off = now_s() - theirs
    if abs(off) > OFF_S:
        raise ClockError(f"this board's clock says {_said(now_s())}, the gateway's {_said(theirs)}")


def check(state: Path, url: str, ca: Path) -> None:
    """Raise ClockError while the clock cannot be right. Where it is before the floor, the gateway has the last word: a
    floor saved by a clock that was ahead must not hold a board up for ever."""
    try:
        check_floor(state)
    except ClockError as early:
        try:
            check_gateway(url, ca)
        except UnavailableError:
            raise early from None
        save(state)


def gateway_s(url: str, ca: Path) -> float:
    """The gateway's time in seconds since 1970. Raises UnavailableError, RefusedError, MessageError."""

    def timeless() -> ssl.SSLContext:
        context = mutual_tls(ca)
        context.verify_flags |= NO_CHECK_TIME  # type: ignore[operator]
        return context

    text = FleetClient(url, timeless).date("/v1/ca")
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        raise MessageError(f"{url}: expected the time in the header Date, found {text[:40]!r}") from None


def _said(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
