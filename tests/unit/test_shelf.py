"""The registrar's side of the repository: what is on the ledger, what is not, and in which order the two are told."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from release_site import Site, golden_of, linear, parts_of

from bmoe.ledger.store import model_name
from bmoe.protocol.errors import BmoeError, ConfigError, InputError, RefusedError, UnavailableError, UnknownError
from bmoe.storage.blobs import FolderStore
from bmoe.storage.manifest import render_manifest
from bmoe.storage.repository import Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.updater import Installed
from coordinator.config import load_settings
from coordinator.identity.shelf import Shelf, open_repository

pytestmark = pytest.mark.usefixtures("unsynced")


class Desk:
    """The ledger's desk over a fleet in memory; `away` is what it raises."""

    def __init__(self, site: Site) -> None:
        self.site, self.state, self.away = site, site.ledger.fleet.state, False

    async def enter(self, *kinds: Any) -> int:
        if self.away:
            raise UnavailableError("the ledger has not taken the entry within 10 s: try again")
        self.site.ledger.fleet.enter("registrar", *kinds)
        self.site.size = self.site.ledger.seal()
        return 1


class Away(FolderStore):
    """A store out of reach."""

    def put(self, path: str, data: bytes) -> None:
        raise UnavailableError("s3://releases: no route to host")


@pytest.fixture
def site(site: Site) -> Site:
    """Two versions are released."""
    for version in (1, 2):
        site.release(site.model(version))
    return site


@pytest.fixture
def shelf(site: Site) -> Shelf:
    """Over the site's own repository and ledger; validators answer with receipts of the last size."""

    async def request(subject: str, data: bytes, timeout: float) -> Any:
        kind, name = next(iter(json.loads(data).items()))
        key = bytes.fromhex(name) if kind == "release" else model_name(*name.split(" "))
        try:
            return SimpleNamespace(data=site.ledger.receipt(kind, key, site.size).encode())
        except BmoeError as error:
            return SimpleNamespace(data=json.dumps({"error": str(error)}).encode())

    stream: Any = SimpleNamespace(client=SimpleNamespace(request=request))
    settings = load_settings(state=site.folder)
    site.told, site.founded = [], asyncio.Event()  # type: ignore[attr-defined]
    desk: Any = Desk(site)

    def report(event: str, **facts: Any) -> None:
        site.told.append(event)  # type: ignore[attr-defined]
        if event == "repository_founded":
            site.founded.set()  # type: ignore[attr-defined]

    made = Shelf(site.repository, site.blobs, desk, stream, settings, report)
    made._trust = lambda: site.ledger.fleet.trust  # type: ignore[method-assign]
    return made


async def test_a_version_is_listed_and_shown_with_what_the_ledger_says(shelf: Shelf, site: Site) -> None:
    site.release(site.model(3), enter=False)
    rows = await shelf.list()
    assert [(row["version"], row["owner"], row["state"]) for row in rows] == [(1, "ada", "kept"), (2, "ada", "in use")]
    shown = await shelf.show("lines", 2)
    assert (shown["final"], shown["keys"], shown["threshold"]) == (True, 1, 1)
    assert [part["sha256"] for part in shown["parts"]] == parts_of(site.model(2))
    assert (await shelf.show("lines", 3))["state"] == "not on the ledger"
    with pytest.raises(UnknownError, match="lines version 9 is not in the repository"):
        await shelf.show("lines", 9)


async def test_a_withdrawal_is_told_to_the_ledger_first(shelf: Shelf, site: Site) -> None:
    shelf._desk.away = True  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError):
        await shelf.withdraw("lines", 2, "labels swapped")
    assert site.update(2) == Installed("lines", 2, 0)
    shelf._desk.away = False  # type: ignore[attr-defined]
    assert await shelf.withdraw("lines", 2, "labels swapped") == (parts_of(site.model(2)), 1)
    assert [row["version"] for row in await shelf.list()] == [1]
    site.stays("is not in the repository: withdrawn", installed=2)


async def test_a_withdrawal_that_the_store_missed_is_finished_by_doing_it_again(shelf: Shelf, site: Site) -> None:
    folder = site.folder / "repository"
    site.repository.store = Away(folder)
    with pytest.raises(UnavailableError, match="no route to host"):
        await shelf.withdraw("lines", 2, "labels swapped")
    assert site.ledger.fleet.state.models["lines"].version == 1, "the ledger has it, so nobody is served it"
    site.repository.store = FolderStore(folder)
    assert (await shelf.withdraw("lines", 2, "labels swapped"))[1] == 1
    site.stays("is not in the repository: withdrawn", installed=0)


async def test_a_part_that_another_version_has_is_not_withdrawn(shelf: Shelf, site: Site) -> None:
    site.release(site.model(3, site.model(2).experts[0]))
    assert await shelf.withdraw("lines", 3, "a manifest with a mistake") == ([], 2)
    assert site.update(2) == Installed("lines", 2, 0)
    with pytest.raises(RefusedError, match="lines version 9 is not on this ledger"):
        await shelf.withdraw("lines", 9, "never was")


async def test_another_owners_model_and_a_foreign_origin_never_reach_the_ledger(shelf: Shelf, site: Site) -> None:
    onnx, w = linear(3)
    model = site.model(3, site.expert(onnx, golden_of(w)))
    with pytest.raises(RefusedError, match="model lines belongs to ada, not to bob"):
        await shelf.put(model, render_manifest(model), "bob", b"")
    with pytest.raises(InputError, match="origin: not an in-toto statement"):
        await shelf.put(model, render_manifest(model), "ada", b"{}")
    assert 3 not in [row["version"] for row in await shelf.list()]


async def test_receipts_and_statements_are_had_for_what_is_on_the_ledger(shelf: Shelf, site: Site) -> None:
    (part,) = parts_of(site.model(1))
    assert (await shelf.receipt("release", part)).startswith(b"c2sp.org/tlog-proof")
    assert shelf.statement("release", part) and shelf.statement("model", "lines 1")
    assert shelf.statement("release", "00" * 32) is None and shelf.statement("model", "lines 9") is None
    with pytest.raises(UnavailableError, match="no receipt for lines 9"):
        await shelf.receipt("model", "lines 9")
    assert await shelf.final("lines", 1)


async def test_a_blob_that_only_the_store_has_is_brought_and_a_damaged_one_is_not(shelf: Shelf, site: Site) -> None:
    (part,) = parts_of(site.model(1))
    (site.blobs / part).unlink()
    await shelf.fetch_blob(part)
    assert (site.blobs / part).is_file()
    (site.blobs / part).unlink()
    site.repository.store.put(f"blobs/{part}", b"another")
    with pytest.raises(InputError, match="it was tampered with"):
        await shelf.fetch_blob(part)
    assert not (site.blobs / part).exists() and not list(site.blobs.glob(".*"))
    with pytest.raises(UnknownError):
        await shelf.fetch_blob("00" * 32)


async def test_files_of_a_version_withdrawn_long_ago_go_and_no_others(shelf: Shelf, site: Site) -> None:
    site.ledger.fleet.state.versions.pop(("toy", 1))  # the fixture's own, of which there is no file
    shared, gone = site.model(1), site.model(2)
    stray = site.blob(b"staged, and never published")
    for path in site.blobs.iterdir():
        os.utime(path, (1, 1))
    fresh = site.blob(b"being published now")
    await shelf.withdraw("lines", 2, "labels swapped")
    marks = site.ledger.fleet.state.withdrawn_versions
    marks[("lines", 2)] = replace(marks[("lines", 2)], time_ms=int(time.time() * 1000))
    assert (await shelf.prune(1, dry_run=False))["blobs"] == [stray], "withdrawn today: it may still be judged"
    marks[("lines", 2)] = replace(marks[("lines", 2)], time_ms=1)
    golden = gone.experts[0].golden
    assert golden is not None
    wanted = {*parts_of(gone), golden.sha256} - set(parts_of(shared))
    dry = await shelf.prune(1, dry_run=True)
    assert set(dry["blobs"]) == wanted and dry["bytes"] > 0
    assert all((site.blobs / digest).is_file() for digest in wanted)
    await shelf.prune(1, dry_run=False)
    assert not any((site.blobs / digest).exists() for digest in wanted) and (site.blobs / fresh).exists()
    assert all(site.repository.store.size(f"blobs/{digest}") is None for digest in wanted)
    assert site.update(1) == Installed("lines", 1, 0), "what stands is whole"
    assert (await shelf.prune(1, dry_run=False))["blobs"] == []


async def test_nothing_is_pruned_while_a_manifest_cannot_be_read(shelf: Shelf, site: Site) -> None:
    site.ledger.fleet.state.versions.pop(("toy", 1))
    site.blob(b"staged, and never published")
    for path in site.blobs.iterdir():
        os.utime(path, (1, 1))
    before = sorted(site.blobs.iterdir())
    manifest = site.ledger.fleet.state.versions[("lines", 1)].manifest.hex()
    site.repository.store.remove(f"blobs/{manifest}")
    with pytest.raises(UnknownError):
        await shelf.prune(1, dry_run=False)
    assert sorted(site.blobs.iterdir()) == before


async def test_a_store_that_is_away_holds_up_no_start(shelf: Shelf, site: Site, tmp_path: Path) -> None:
    shelf.repository = Repository(Away(tmp_path / "elsewhere"), KeyFolder(tmp_path / "other keys"))
    await shelf.open()
    assert site.told == ["repository_renewal_failed"]  # type: ignore[attr-defined]
    shelf.repository.store = FolderStore(tmp_path / "elsewhere")
    fresh = asyncio.ensure_future(shelf.keep_fresh())
    await asyncio.wait_for(site.founded.wait(), 10)  # type: ignore[attr-defined]
    fresh.cancel()


def test_the_repository_is_a_folder_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    here = open_repository(load_settings(state=tmp_path))
    there = open_repository(load_settings(state=tmp_path, repository="memory:///elsewhere"))
    assert here.found()
    assert (tmp_path / "repository" / "metadata" / "timestamp.json").is_file()
    assert len(list((tmp_path / "identity" / "repository").glob("*.key"))) == 4
    with pytest.raises(ConfigError, match="copy all of the repository to where it is to be"):
        there.found()  # boards have pinned the root of the one that is here
