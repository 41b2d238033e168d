"""The registrar's side of the repository: releases go in before the ledger is told, and out after it is; what expires is
renewed. Its keys are the registrar's alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bmoe.ledger.rules.entries import Withdrawal
from bmoe.ledger.rules.receipt_release import verify_model
from bmoe.ledger.rules.trust import Trust
from bmoe.ledger.stream import LedgerStream
from bmoe.protocol.errors import BmoeError, RefusedError, UnavailableError
from bmoe.protocol.threads import in_thread
from bmoe.storage import publication
from bmoe.storage.blobs import open_store
from bmoe.storage.manifest import MAX_MANIFEST_BYTES, Model, parse_manifest
from bmoe.storage.origin import MAX_ORIGIN_BYTES, check_origin, make_origin
from bmoe.storage.repository import Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import experts_and_gate
from coordinator.config import GatewaySettings
from coordinator.identity import pruning
from coordinator.identity.desk import LedgerDesk
from coordinator.receipts import gather
from coordinator.state_layout import StateLayout

LOOK_S = 3600.0
FINAL_S = 10.0
AGAIN_S = 0.1


def open_repository(settings: GatewaySettings) -> Repository:
    """The repository of a gateway, which may not have been founded yet; raises ConfigError for a URL nothing can open."""
    layout = StateLayout(settings.state)
    return Repository(open_store(settings.repository or layout.repository), KeyFolder(layout.repository_keys))


class Shelf:
    """One repository and the ledger that says what of it may be used. Calls that change it wait for one another."""

    def __init__(
        self,
        repository: Repository,
        blobs: Path,
        desk: LedgerDesk,
        stream: LedgerStream,
        settings: GatewaySettings,
        report: Callable[..., Any],
    ) -> None:
        self.repository, self.blobs = repository, blobs
        self._desk, self._stream, self._settings, self._report = desk, stream, settings, report
        self._busy, self._fetching = asyncio.Lock(), asyncio.Lock()

    async def open(self) -> None:
        """Found the repository at the first start; raises ConfigError where it is damaged.

        A store that is away holds up publications, not the gateway: it is tried again, see `keep_fresh`.
        """
        try:
            await self._found()
        except UnavailableError as error:
            self._report("repository_renewal_failed", reason=str(error))

    async def put(self, model: Model, manifest: bytes, owner: str, origin: bytes, draft: bool = False) -> None:
        """Put a version into the repository; raises RefusedError for another owner's model, UnsignedError where keys kept
        elsewhere must sign: with `draft` the drafts that it carries are to be signed and accepted."""
        statement = origin or make_origin(model, {})
        check_origin(statement, model)
        async with self._busy:
            await self._found()
            facts = (owner, model, manifest, self.blobs, statement, draft)
            await in_thread(lambda: publication.publish(self.repository, *facts))
        self._report("release_published", model=model.name, version=model.version, owner=owner)

    async def withdraw(self, model: str, version: int, reason: str, draft: bool = False) -> tuple[list[str], int]:
        """Take a version back, for good: on the ledger first, so that it counts though the repository be away.

        Returns the parts, in hex, that went with it, for no other version that stands has them, and the version in use
        then, 0 for none. Raises RefusedError for a version that is not on the ledger, UnsignedError as `put` does.
        """
        state = self._desk.state
        version_of = state.versions.get((model, version))
        if version_of is None:
            raise RefusedError(f"{model} version {version} is not on this ledger")
        kept = {
            digest
            for key, other in state.versions.items()
            if key != (model, version) and key not in state.withdrawn_versions
            for digest in (*other.experts, other.gate)
        }
        digests = tuple(d for d in dict.fromkeys((*version_of.experts, version_of.gate)) if d and d not in kept)
        facts = {"model": model, "version": version, "digests": digests, "reason": reason}
        await self._desk.enter((Withdrawal, facts))
        if (model, version) not in state.withdrawn_versions:
            raise UnavailableError(f"the ledger did not accept the withdrawal of {model} {version}: see its log")
        parts = [digest.hex() for digest in digests]
        async with self._busy:
            await in_thread(lambda: publication.withdraw(self.repository, model, version, parts, draft))
        self._report("release_withdrawn", model=model, version=version, reason=reason)
        served = state.models.get(model)
        return parts, served.version if served else 0

    async def rotate(
        self, role: str, keys: int, threshold: int, public: Sequence[Any] = (), draft: bool = False
    ) -> dict[str, Any]:
        """Give a role new keys; raises RefusedError or UnknownError as the repository does."""
        async with self._busy:
            old = await in_thread(lambda: self.repository.rotate(role, keys, threshold, public, draft))
        keys = len(public) or keys
        self._report("repository_keys_rotated", role=role, keys=keys, threshold=threshold)
        return {"role": role, "keys": keys, "threshold": threshold, "removed": old}

    async def accept(self, documents: Mapping[str, bytes]) -> dict[str, Any]:
        """Take drafts that were signed elsewhere; raises RefusedError, InputError as the repository does."""
        async with self._busy:
            gone = await in_thread(lambda: self.repository.accept(documents))
        self._report("repository_signed", roles=sorted(documents))
        return {"roles": sorted(documents), "removed": gone}

    async def renewals(self) -> tuple[dict[str, bytes], dict[str, list[str]]]:
        """Drafts, and who may sign them, of the roles that will expire and whose keys are kept elsewhere."""
        async with self._busy:
            return await in_thread(self.repository.renewals)

    async def prune(self, days: float, dry_run: bool) -> dict[str, Any]:
        """Remove blobs that no version has but such as were withdrawn so many days ago; what went, or would go.

        Raises UnknownError, InputError, UnavailableError where a manifest that may need some of them cannot be read.
        """
        state, before_ms = self._desk.state, int((time.time() - days * 86_400) * 1000)

        def work() -> dict[str, int]:
            """In a thread: look, and remove."""
            origins = [found.origin for found in publication.versions(self.repository.load())]
            found = pruning.old_blobs(self.blobs, days)

            def manifest(digest: str) -> Model:
                """A version's manifest, from the store."""
                return parse_manifest(publication.read_blob(self.repository, digest, MAX_MANIFEST_BYTES))

            gone = pruning.needless(state, manifest, origins, found, before_ms)
            if not dry_run:
                pruning.remove(gone, self.blobs, self.repository.store)
            return {digest: found[digest] for digest in sorted(gone)}

        async with self._busy:
            gone = await in_thread(work)
        if gone and not dry_run:
            self._report("blobs_pruned", count=len(gone), bytes=sum(gone.values()))
        return {"blobs": list(gone), "bytes": sum(gone.values())}

    async def list(self) -> list[dict[str, Any]]:
        """Every version in the repository, with what the ledger says of it."""
        async with self._busy:
            roles = await in_thread(self.repository.load)
        state = self._desk.state
        return [{**asdict(found), "state": self._state_of(found.model, found.version)}
                for found in publication.versions(roles) if (found.model, found.version) in state.versions]  # fmt: skip

    async def show(self, model: str, version: int) -> dict[str, Any]:
        """A version: parts, owner's keys and threshold, expiry of the metadata, origin, and where it stands."""

        def read() -> dict[str, Any]:
            """In a thread: what repository and metadata say. Raises UnknownError for a version that is not there."""
            roles = self.repository.load()
            found, manifest = publication.read_version(self.repository, roles, model, version)
            trusted = roles.trusts(f"owner-{found.owner}")
            origin = publication.read_blob(self.repository, found.origin, MAX_ORIGIN_BYTES)
            parts = [{"name": p.name, "file": p.file, "sha256": p.sha256, "bytes": p.bytes}
                     for p in experts_and_gate(manifest)]  # fmt: skip
            expires = {role: roles.named(role).signed.expires.isoformat() for role in ("timestamp", "targets")}
            keys = {"keys": len(trusted.keyids), "threshold": trusted.threshold}
            return {
                **asdict(found),
                **keys,
                "expires": expires,
                "parts": parts,
                "origin_statement": check_origin(origin),
            }

        async with self._busy:
            shown = await in_thread(read)
        return {**shown, "state": self._state_of(model, version), "final": await self._is_final(model, version)}

    async def final(self, model: str, version: int, wait: bool = True) -> bool:
        """Whether the entry of a version is final, within a few seconds; at once where `committed` is enough."""
        if self._settings.release_assurance == "committed":
            return True
        deadline = time.monotonic() + FINAL_S
        while not await self._is_final(model, version):
            if not wait or time.monotonic() > deadline:
                return False
            await asyncio.sleep(AGAIN_S)
        return True

    def held(self, model: str, version: int) -> bool:
        """Whether a version is kept out of use until its rollout is done."""
        return (model, version) in self._desk.state.held

    async def receipt(self, kind: str, name: str) -> bytes:
        """The receipt of a "release" (SHA-256) or a "model" (NAME VERSION); raises UnknownError, UnavailableError."""
        return await gather(self._stream, self._desk.state.validators, kind, name, self._known(kind, name))

    def statement(self, kind: str, name: str) -> bytes | None:
        """The registrar's sealed statement of it, for those whom `committed` is enough."""
        state = self._desk.state
        if kind == "release":
            return state.release_statements.get(bytes.fromhex(name))
        model, _, version = name.rpartition(" ")
        return state.version_statements.get((model, int(version)))

    async def fetch_blob(self, digest: str) -> None:
        """Bring a blob that only the store has to where it is served from; raises UnknownError, UnavailableError."""
        if (self.blobs / digest).is_file():
            return
        async with self._fetching:
            if not (self.blobs / digest).is_file():
                await in_thread(lambda: publication.fetch(self.repository, digest, self.blobs))

    async def keep_fresh(self) -> None:
        """Renew metadata long before it expires, for ever; a store that is away is tried again."""
        while True:
            try:
                async with self._busy:
                    await self._found()
                    renewed, elsewhere = await in_thread(self.repository.refresh)
                if renewed:
                    self._report("repository_renewed", roles=renewed)
                if elsewhere:
                    self._report("repository_unsigned", days=elsewhere)
            except BmoeError as error:
                self._report("repository_renewal_failed", reason=str(error))
            await asyncio.sleep(LOOK_S)

    async def _found(self) -> None:
        if await in_thread(self.repository.found):
            self._report("repository_founded", place=self._settings.repository or str(self.blobs.parent / "repository"))

    def _known(self, kind: str, name: str) -> bool:
        return self.statement(kind, name) is not None

    async def _is_final(self, model: str, version: int) -> bool:
        try:
            receipt = await self.receipt("model", f"{model} {version}")
            verify_model(receipt, self._trust())
        except BmoeError:
            return False
        return True

    def _trust(self) -> Trust:
        return StateLayout(self._settings.state).load_trust()

    def _state_of(self, model: str, version: int) -> str:
        state = self._desk.state
        key = (model, version)
        if key in state.withdrawn_versions:
            return f"withdrawn: {state.withdrawn_versions[key].reason}"
        if key not in state.versions:
            return "not on the ledger"
        served, rolling = state.models.get(model), state.rollouts.get(model)
        if served is not None and served.version == version:
            return "in use"
        if rolling is not None and rolling.version == version:
            return f"rollout {rolling.stage}"
        return "kept"
