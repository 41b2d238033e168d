"""What carries releases in a gateway: update messages over MQTT, parcels out of the repository, Flower where it is.

Flower is asked for by the first rollout that may use it: a file tells `bmoe up` to start the SuperLink.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.releases import ENDED
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.storage.publication import bundle, read_version
from bmoe.storage.repository import Repository
from bmoe.storage.targets import model_receipt_path, release_receipt_path
from coordinator.config import GatewaySettings
from coordinator.dispatch import Dispatcher
from coordinator.embedded.ports import read_ports
from coordinator.embedded.state_dir import private_dir
from coordinator.flower.layout import FlowerLayout, has_flower
from coordinator.flower.post import Post
from coordinator.identity.shelf import open_repository
from coordinator.receipts import Receipts
from coordinator.rollout.carrier import Carrier
from coordinator.rollout.driver import Rollouts
from coordinator.rollout.parcel import Parcel, make_parcel, sweep
from coordinator.state_layout import StateLayout

log = structlog.get_logger("rollout")
# The repository's metadata may be renewed meanwhile, and what expires is refused.
PARCEL_S = 300.0
LOOK_S = 1.0
# A SuperLink that is not there after this time is not waited for: releases go over HTTPS.
FLOWER_S = 180.0


class Carrying:
    """One a coordinator: `run` it, `stop` it."""

    def __init__(
        self,
        rollouts: Rollouts,
        dispatcher: Dispatcher,
        settings: GatewaySettings,
        receipts: Receipts,
    ) -> None:
        self._rollouts, self._dispatcher, self._receipts = rollouts, dispatcher, receipts
        self._settings = settings
        self._state, self._layout = rollouts.state, StateLayout(settings.state)
        self._flower = FlowerLayout(self._layout.flower)
        self._post: Post | None = None
        self._parcels: dict[bytes, tuple[float, Parcel]] = {}
        self._making = asyncio.Lock()
        self._superlink = ""

    async def run(self) -> None:
        """Have Flower started once a rollout may use it; without it, releases go over HTTPS."""
        rollouts = self._rollouts
        patience_s = FLOWER_S if has_flower() else 0.0
        rollouts.carrier = Carrier(self._flower, lambda: self._post, self._tell, self._parcel, patience_s)
        if not has_flower():
            return
        while not (self._flower.wanted.exists() or rollouts.wants_flower()):  # noqa: ASYNC110 (the ledger has no event)
            await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(private_dir, self._flower.folder)
        post = Post(self._flower)
        await post.start()
        if not self._flower.wanted.exists():
            write_durably(self._flower.wanted, b"")
            log.info("flower_wanted")
        while "supernodes" not in (ports := read_ports(self._layout.root)):  # noqa: ASYNC110 (another process has no event)
            await asyncio.sleep(LOOK_S)
        host = self._settings.agents_dial
        self._superlink = f"{f'[{host}]' if ':' in host else host}:{ports['supernodes']}"
        self._post = post

    async def stop(self) -> None:
        """Hang up."""
        if self._rollouts.carrier is not None:
            await self._rollouts.carrier.close()
        if self._post is not None:
            await self._post.stop()

    def _tell(self, agent: str, rollout: Rollout, carrier: str) -> None:
        version = self._state.versions[(rollout.model, rollout.version)]
        facts: dict[str, Any] = {
            "rollout": rollout.rollout, "model": rollout.model, "version": rollout.version, "digests": version.experts,
            "carrier": carrier, "superlink": self._superlink if carrier == "flower" else "",
            "issued_ms": time.time_ns() // 1_000_000,
        }  # fmt: skip
        self._dispatcher.update(agent, facts)

    async def _parcel(self, rollout: Rollout) -> Parcel:
        """What to push; made once, and anew after a while."""
        async with self._making:
            made, parcel = self._parcels.get(rollout.rollout, (0.0, None))
            if parcel is None or time.monotonic() - made > PARCEL_S:
                kept = {r.rollout for r in self._state.rollouts.values() if r.stage not in ENDED} | {rollout.rollout}
                self._parcels = {key: value for key, value in self._parcels.items() if key in kept}
                await asyncio.to_thread(sweep, self._flower.folder / "out", {key.hex() for key in kept})
                parcel = await self._make(rollout)
                self._parcels[rollout.rollout] = (time.monotonic(), parcel)
            return parcel

    async def _make(self, rollout: Rollout) -> Parcel:
        version = self._state.versions.get((rollout.model, rollout.version))
        if version is None:
            raise UnavailableError(f"{rollout.model} {rollout.version} is not on the ledger")
        repository = open_repository(self._settings)
        metadata, blobs = await asyncio.to_thread(read_files, repository, rollout.model, rollout.version)
        files = dict(metadata)
        parts = [digest.hex() for digest in (*version.experts, *([version.gate] if version.gate else []))]
        found = await asyncio.gather(
            self._receipts.of_model(rollout.model, rollout.version), *map(self._receipts.of_release, parts)
        )
        names = [model_receipt_path(rollout.model, rollout.version), *map(release_receipt_path, parts)]
        files |= dict(zip(names, found, strict=True))
        out = self._flower.folder / "out" / rollout.rollout.hex()
        return await asyncio.to_thread(make_parcel, files, blobs, repository, out, self._layout.blobs)


def read_files(repository: Repository, model: str, version: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """Metadata by path, and the size of each blob by SHA-256, in the order in which an updater asks for them.

    The manifest comes first; the statement of origin is for people, no updater reads it.
    """
    found, _ = read_version(repository, repository.load(), model, version)
    whole = bundle(repository, model, version)
    rest = {sha256: size for sha256, size in whole.blobs.items() if sha256 not in (found.manifest, found.origin)}
    return whole.metadata, {found.manifest: whole.blobs[found.manifest], **rest}
