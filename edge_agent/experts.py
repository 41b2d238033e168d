"""Experts on the board's disk: release and file fetched by digest, checked, kept; the longest unused go first.

What is believed: a Release signed by the registrar names the expert's digest, size and tensors; a file with that
SHA-256 is the expert, whoever served it. A part that was left by a broken download is resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bmoe.inference.runner import ExpertFile
from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from bmoe.protocol.files import sync_folder, write_durably
from bmoe.protocol.messages import Release, open_message
from bmoe.protocol.threads import in_thread
from edge_agent.fleet import FleetClient
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
KNOWN_MAX = 256
RETRY_S = 2.0
_OURS = re.compile(r"[0-9a-f]{64}\.(onnx|part)")


@dataclass(frozen=True)
class Served:
    """An expert ready to run: its signed release and its file."""

    release: Release
    file: ExpertFile


class TooLargeError(RefusedError):
    """An expert that this board will not hold."""


class Experts:
    """The cache in one folder. `get` gives an expert, fetched first if need be; equal requests share one fetch."""

    def __init__(
        self,
        folder: Path,
        fleet: FleetClient,
        registrar: bytes,
        ledger: bytes,
        *,
        file_bytes: int,
        cache_bytes: int,
        check: Callable[[Release], None] = lambda release: None,
        keep: Callable[[], set[str]] = set,
    ) -> None:
        """`check` raises for a release whose file may not be fetched; `keep` names files, in hex, that never go."""
        self._check, self._keep = check, keep
        self._folder, self._fleet, self._registrar, self._ledger = folder, fleet, registrar, ledger
        self._file_bytes, self._cache_bytes = min(file_bytes, cache_bytes), cache_bytes
        self._ready: OrderedDict[bytes, Served] = OrderedDict()
        self._fetching: dict[bytes, asyncio.Task[Served]] = {}
        self._failed: OrderedDict[bytes, tuple[float, BmoeError]] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    async def get(self, digest: bytes) -> Served:
        """The expert of that SHA-256. Raises RefusedError when the gateway has released none such, TooLargeError,
        UnavailableError when it cannot be fetched now, InputError when what is served is not what was signed."""
        ready = self._ready.get(digest)
        if ready is not None and ready.file.path.exists():  # an update that needs room drops what nobody has installed
            self._ready.move_to_end(digest)
            return ready
        if digest not in self._fetching:
            failed_at, error = self._failed.get(digest, (0.0, None))
            if error is not None and time.monotonic() - failed_at < RETRY_S:
                raise error  # a burst of tasks for an expert that cannot be had must not become a burst of requests
            self._fetching[digest] = asyncio.ensure_future(self._obtain(digest))
        # Shielded: one task that gives up must not end the download for the others.
        return await asyncio.shield(self._fetching[digest])

    def forget(self, digest: bytes) -> None:
        """Drop an expert whose file turned out to be unusable, so that it is fetched again."""
        self._ready.pop(digest, None)
        self._path(digest).unlink(missing_ok=True)

    async def trim(self) -> None:
        """Drop what exceeds the cache: updates bring experts past it."""
        async with self._one_at_a_time:
            with contextlib.suppress(OSError):
                await in_thread(lambda: self._make_room(0))

    async def close(self) -> None:
        """Stop waiting for downloads; what has arrived stays to be resumed."""
        for task in self._fetching.values():
            task.cancel()
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)

    async def _obtain(self, digest: bytes) -> Served:
        try:
            async with self._one_at_a_time:
                served = await in_thread(lambda: self._fetch(digest))
        except BmoeError as error:
            self._failed[digest] = (time.monotonic(), error)
            while len(self._failed) > KNOWN_MAX:
                self._failed.popitem(last=False)
            raise
        except OSError as error:
            raise UnavailableError(f"expert {digest.hex()[:12]} cannot be stored: {error.strerror}") from None
        finally:
            self._fetching.pop(digest, None)
        self._failed.pop(digest, None)
        self._ready[digest] = served
        while len(self._ready) > KNOWN_MAX:
            self._ready.popitem(last=False)
        return served

    def _fetch(self, digest: bytes) -> Served:
        """In a thread: from the folder if it is there and whole, else from the gateway."""
        release = self.release(digest)
        path = self._path(digest)
        if not path.exists() or path.stat().st_size != release.size:
            self._check(release)
            self._make_room(release.size, digest)
            started = time.monotonic()
            self._download(release)
            took_ms = round(1000 * (time.monotonic() - started))
            log.info(event("expert_fetched", expert=digest, name=release.expert_name, bytes=release.size, ms=took_ms))
        os.utime(path)
        return Served(release, ExpertFile(digest, path))

    def release(self, digest: bytes) -> Release:
        """In a thread: the signed release, from the folder or from the gateway; raises as `get` does."""
        path = self._folder / f"{digest.hex()}.release"
        try:
            return self._checked(path.read_bytes(), digest)
        except (FileNotFoundError, InputError, RefusedError):
            raw = self._fleet.get(f"/v1/releases/{digest.hex()}")
        release = self._checked(raw, digest)
        write_durably(path, raw)
        return release

    def _checked(self, raw: bytes, digest: bytes) -> Release:
        sealed = open_message(Release, raw)
        sealed.verify(self._registrar)
        release = sealed.header
        if (release.digest, release.ledger) != (digest, self._ledger):
            raise RefusedError(f"the release served for {digest.hex()[:12]} is of {release.digest.hex()[:12]}")
        if not 0 < release.size <= self._file_bytes:
            raise TooLargeError(f"{release.expert_name} has {release.size} bytes, we take {self._file_bytes}")
        return release

    def _download(self, release: Release) -> None:
        """Resume or begin; on disk under its name only when whole and of the right digest."""
        path = self._path(release.digest)
        part = path.with_suffix(".part")
        with open(part, "ab") as file:
            have = file.tell()
            if have > release.size:
                file.truncate(have := 0)

            def sink(chunk: bytes, from_start: bool) -> None:
                if from_start:
                    file.seek(0)
                    file.truncate(0)
                file.write(chunk)

            if have < release.size:
                self._fleet.fetch(f"/v1/blobs/{release.digest.hex()}", have, release.size, sink)
            file.flush()
            os.fsync(file.fileno())
        size, found = _measure(part)
        if size < release.size:
            raise UnavailableError(f"{release.expert_name}: {size} of {release.size} bytes came; resumed next time")
        if found != release.digest:
            part.unlink()
            raise InputError(f"{release.expert_name} should have SHA-256 {release.digest.hex()}, came {found.hex()}")
        os.replace(part, path)
        sync_folder(self._folder)

    def _make_room(self, needed: int, keep: bytes = b"") -> None:
        files = [(entry.stat(), entry) for entry in self._folder.iterdir() if _OURS.fullmatch(entry.name)]
        total = sum(status.st_size for status, _ in files) + needed
        kept = {keep.hex(), *self._keep()}
        for status, path in sorted(files, key=lambda item: item[0].st_mtime):
            if total <= self._cache_bytes:
                break
            if path.stem in kept:
                continue
            self._ready.pop(bytes.fromhex(path.stem), None)
            path.unlink(missing_ok=True)
            path.with_suffix(".release").unlink(missing_ok=True)
            total -= status.st_size
            log.info(event("expert_evicted", expert=path.stem, bytes=status.st_size))

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.onnx"


def _measure(path: Path) -> tuple[int, bytes]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.digest()
