"""A watched folder as a source: a file dropped in is a request, its answer is written beside it.

A file's way: it is dropped into the folder, lies in the folder's `work` while it is in work, and in its `done` at the end.
Its answer is written beside where it was dropped, as x.npy.answer.json, before the last step, in one step of its own.
What a crash finds: in `work` is a file that may have been asked already; it is asked again under the same id, which the
gateway runs once. If its answer is there already, it is only moved. Nothing is ever deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import ConfigError, InputError, RefusedError
from bmoe.protocol.files import sync_folder, write_durably
from bmoe.protocol.threads import in_thread
from edge_agent.logs import event
from edge_agent.source import Ask, Outcome, Question
from edge_agent.source_files import SUFFIXES, read_inputs

log = logging.getLogger("bmoe.agent")
ANSWER, VERIFIED = ".answer.json", ".verified.json"
NAME_MAX = 200


class FolderSource:
    """Watches one folder, by looking into it every `poll_s`; files are asked about one after the other, by name."""

    def __init__(self, folder: Path, *, poll_s: float, file_bytes: int) -> None:
        self._folder, self._work, self._done = folder, folder / "work", folder / "done"
        self._poll_s, self._file_bytes = poll_s, file_bytes
        self._seen: dict[str, tuple[int, int]] = {}
        try:
            for path in (folder, self._work, self._done):
                path.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be watched: {error.strerror}") from None

    async def run(self, model: ReleasedModel, ask: Ask) -> None:
        """For ever: take up what an earlier run left in work, then whatever is dropped in."""
        for path in sorted(self._work.iterdir()):
            await self._serve(path, model, ask)
        while True:
            for name in await in_thread(self._settled):
                await self._serve(self._claim(name), model, ask)
            await asyncio.sleep(self._poll_s)

    async def told(self, outcome: Outcome) -> None:
        """Write the verified answer beside the unverified one."""
        values = {**outcome.reply, "differs": outcome.differs}
        await in_thread(lambda: self._write(outcome.reference + VERIFIED, values))

    def _settled(self) -> list[str]:
        """Names of regular files that have not changed since the last look: what is still being written can wait."""
        found: dict[str, tuple[int, int]] = {}
        for entry in os.scandir(self._folder):
            wanted = entry.name.lower().endswith(SUFFIXES) and not entry.name.endswith((ANSWER, VERIFIED))
            if wanted and not entry.name.startswith(".") and len(entry.name) <= NAME_MAX:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found[entry.name] = (status.st_mtime_ns, status.st_size)
        settled = [name for name, state in found.items() if self._seen.get(name) == state]
        self._seen = found
        return sorted(settled)

    def _claim(self, name: str) -> Path:
        """Move a file to work/: from now on the name is free for the next one. Nothing else lies there by now."""
        path = self._work / name
        os.rename(self._folder / name, path)
        sync_folder(self._work)
        sync_folder(self._folder)
        return path

    async def _serve(self, path: Path, model: ReleasedModel, ask: Ask) -> None:
        """One file in work/, from its bytes to done/."""
        name = path.name
        data, identity, fault = await in_thread(lambda: _read(path, self._file_bytes))
        if self._answered(name) != identity:
            try:
                if fault:
                    raise InputError(f"{name} cannot be read: {fault}")
                inputs = await in_thread(lambda: read_inputs(name, data, model, self._file_bytes))
                reply = await ask(Question(identity, inputs, name))
            except (InputError, RefusedError) as error:
                log.warning(event("file_refused", file=name, reason=error))
                reply = {"id": identity, "error": str(error)}
            else:
                assurance = reply["parameters"].get("assurance")
                log.info(event("file_answered", file=name, id=identity, assurance=assurance))
            await in_thread(lambda: self._write(name + ANSWER, {**reply, "id": identity}))
        await in_thread(lambda: self._finish(path, identity))

    def _answered(self, name: str) -> str:
        """The id of the request whose answer lies beside the file's place, if any does."""
        try:
            return str(json.loads((self._folder / (name + ANSWER)).read_bytes())["id"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return ""

    def _write(self, name: str, values: dict[str, Any]) -> None:
        write_durably(self._folder / name, json.dumps(values).encode())

    def _finish(self, path: Path, identity: str) -> None:
        target = self._done / path.name
        if target.exists():  # an earlier file of that name is kept
            target = self._done / f"{path.stem}.{identity[:8]}{path.suffix}"
        os.rename(path, target)
        sync_folder(self._done)
        sync_folder(self._work)


def _read(path: Path, limit: int) -> tuple[bytes, str, str]:
    """A file's bytes, one more than `limit` at most; the id of its request, of this name, time and content; and why it
    cannot be read, if it cannot."""
    data, fault, changed_ns = b"", "", path.stat().st_mtime_ns
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        fault = error.strerror or str(error)
    digest = hashlib.sha256(f"{path.name}\0{changed_ns}\0".encode() + data).hexdigest()
    return data, digest[:32], fault
