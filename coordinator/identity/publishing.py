"""Publishing: a version goes into the repository first, then onto the ledger, so that nothing usable lacks either."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import LedgerError, UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.storage.manifest import Model
from coordinator.identity.desk import LedgerDesk
from coordinator.identity.releases import check_publishable, release_entries
from coordinator.identity.shelf import Shelf

HELD = "held until it is rolled out"


async def publish(
    desk: LedgerDesk,
    shelf: Shelf,
    registrar: Signer,
    model: Model,
    manifest: bytes,
    owner: str,
    hold: bool = False,
    origin: bytes = b"",
    draft: bool = False,
) -> int:
    """Enter a model and its releases; the position of their frame, or 0 when the ledger has this very version.

    With `hold` a version that follows another is not in use before its rollout is done: see `bmoe rollout start`.

    Raises RefusedError for what the ledger's rules would refuse, and for an older version than the one served; UnsignedError
    where keys kept elsewhere must sign first, see `Shelf.put`.
    """
    digest = hashlib.sha256(manifest).digest()
    if _published(desk.state, model, digest):
        # Again, for what a crash may have kept from the repository.
        with contextlib.suppress(UnavailableError):
            await shelf.put(model, manifest, owner, origin, draft)
        return 0
    check_publishable(desk.state, model)
    now_ms = time.time_ns() // 1_000_000
    entries = release_entries(registrar, desk, model, digest, owner, now_ms)
    if hold and model.name in desk.state.models:
        facts = {"rollout": os.urandom(16), "model": model.name, "version": model.version, "wave": ()}
        entries.append((Rollout, {**facts, "stage": "paused", "reason": HELD}))
    await shelf.put(model, manifest, owner, origin, draft)
    position = await desk.enter(*entries)
    if not _published(desk.state, model, digest):
        raise LedgerError(f"the ledger did not accept {model.name} {model.version}: see its rejected entries")
    return position


def _published(state: State, model: Model, digest: bytes) -> bool:
    found = state.versions.get((model.name, model.version))
    return found is not None and found.manifest == digest
