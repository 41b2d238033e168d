"""Recent requests of devices: one that is delivered twice is run once, within bounded memory. Pure: time is passed in."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

KEEP_S = 600.0
DEVICE_COUNT = 256
DEVICE_BYTES = 1 << 20
TOTAL_BYTES = 64 << 20
# What an entry costs beside its reply.
ENTRY_BYTES = 256


@dataclass
class _Device:
    """One device's requests, the oldest first: key -> (begun at, reply or None while it is in work)."""

    entries: OrderedDict[bytes, tuple[float, bytes | None]] = field(default_factory=OrderedDict)
    bytes: int = 0


def request_key(client_id: str, model: str, payload: bytes) -> bytes:
    """What makes two requests of one device the same: the client's id, the model and every byte of the body."""
    head = f"{client_id}\0{model}\0".encode()
    return hashlib.sha256(head + payload).digest()


class Recent:
    """What each device asked of late. One device's many requests push out its own older ones, nobody else's; only where
    all together exceed TOTAL_BYTES does the device that holds the most forget, too."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._bytes = 0

    def begin(self, device: str, key: bytes, now_s: float) -> tuple[bool, bytes | None]:
        """(True, None) if the request is new, and in work from now on; else (False, its reply or None if in work)."""
        held = self._devices.get(device)
        while held is not None and held.entries and next(iter(held.entries.values()))[0] < now_s - KEEP_S:
            self._drop_oldest(device)
        held = self._devices.setdefault(device, _Device())
        if key in held.entries:
            return False, held.entries[key][1]
        held.entries[key] = (now_s, None)
        self._account(device, ENTRY_BYTES)
        return True, None

    def done(self, device: str, key: bytes, reply: bytes) -> None:
        """The reply is known: a later copy of the request gets the same."""
        held = self._devices.get(device)
        if held is not None and key in held.entries:
            held.entries[key] = (held.entries[key][0], reply)
            self._account(device, len(reply))

    def forget(self, device: str, key: bytes) -> None:
        """The request came to nothing that lasts: a later copy is a new attempt."""
        self._remove(device, key)

    def _account(self, device: str, size: int) -> None:
        held = self._devices[device]
        held.bytes += size
        self._bytes += size
        while len(held.entries) > DEVICE_COUNT or (held.bytes > DEVICE_BYTES and len(held.entries) > 1):
            self._drop_oldest(device)
        while self._bytes > TOTAL_BYTES:
            self._drop_oldest(max(self._devices, key=lambda name: self._devices[name].bytes))

    def _drop_oldest(self, device: str) -> None:
        self._remove(device, next(iter(self._devices[device].entries)))

    def _remove(self, device: str, key: bytes) -> None:
        held = self._devices.get(device)
        if held is None or key not in held.entries:
            return
        _, reply = held.entries.pop(key)
        size = ENTRY_BYTES + len(reply or b"")
        held.bytes -= size
        self._bytes -= size
        if not held.entries:
            del self._devices[device]
