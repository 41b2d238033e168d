"""The repository as its keeper has it: owners, thresholds, keys, expiry, and death at every write of a change."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from release_site import Site, golden_of, linear, parts_of

from bmoe.protocol.errors import BmoeError, ConfigError, InputError, RefusedError, UnavailableError, UnknownError
from bmoe.storage.blobs import FolderStore, UrlStore, open_store, read_whole
from bmoe.storage.publication import bundle, versions, withdraw
from bmoe.storage.repository import LIFE_S, Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import blob_path
from bmoe.storage.updater import Installed

pytestmark = pytest.mark.usefixtures("unsynced")


class Dying(FolderStore):
    """A folder whose keeper dies after so many writes: whatever it was doing then is the last of it."""

    def __init__(self, folder: Path, writes: int) -> None:
        super().__init__(folder)
        self.left = writes

    def put(self, path: str, data: bytes) -> None:
        self._count()
        super().put(path, data)

    def put_file(self, path: str, source: Path) -> None:
        self._count()
        super().put_file(path, source)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["publish", "withdraw", "owner-ada", "root", "targets", "snapshot", "timestamp"])
def test_a_keeper_that_dies_at_any_write_leaves_what_readers_can_use_and_the_next_change_mends(
    tmp_path: Path, change: str
) -> None:
    site = Site(tmp_path)
    site.release(site.model(1))
    site.release(site.model(2))
    folder = site.folder / "repository"

    def act() -> None:
        if change == "publish":
            site.release(site.model(3), enter=False)
        elif change == "withdraw":
            withdraw(site.repository, "lines", 2, parts_of(site.model(2)))
        else:
            site.repository.rotate(change, keys=2, threshold=2)

    for writes in range(20):
        site.repository.store = Dying(folder, writes)
        try:
            act()
            break
        except KeyboardInterrupt:
            pass
        site.repository.store = FolderStore(folder)
        site.board = tmp_path / f"board-{writes}"
        site.board.mkdir()
        assert site.update(1) == Installed("lines", 1, 0), "a new board cannot read what was left"
    else:
        pytest.fail("it never came to its end")
    assert writes >= 1
    site.repository.store = FolderStore(folder)
    site.release(site.model(4))
    assert site.update(4) == Installed("lines", 4, 1), "a board that followed along cannot go on"


def test_a_keeper_that_dies_while_it_founds_founds_again(tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path / "keys")
    for writes in range(5):
        repository = Repository(Dying(tmp_path / "repository", writes), keys)
        try:
            assert repository.found()
            break
        except KeyboardInterrupt:
            continue
    assert writes == 4 and repository.load().timestamp.signed.version == 1


def test_a_repository_that_lost_its_timestamp_is_not_founded_anew(site: Site) -> None:
    site.release(site.model(1))
    (site.folder / "repository" / "metadata" / "timestamp.json").unlink()
    with pytest.raises(ConfigError, match=r"timestamp.json is missing: restore it"):
        site.repository.found()


def test_keys_are_for_their_owner_alone_and_old_ones_are_removed(site: Site) -> None:
    site.release(site.model(1))
    folder = site.folder / "keys"
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {p.name for p in folder.glob("*.key")}
    assert len(before) == 5
    for role in ("root", "targets", "snapshot", "timestamp", "owner-ada"):
        (old,) = site.repository.rotate(role, keys=3, threshold=2)
        assert not (folder / f"{old}.key").exists()
    assert len(list(folder.glob("*.key"))) == 15 and not before & {p.name for p in folder.iterdir()}


def test_a_model_has_one_owner(site: Site) -> None:
    site.release(site.model(1))
    with pytest.raises(RefusedError, match="model lines belongs to ada, not to bob"):
        site.release(site.model(2), owner="bob")
    site.release(site.model(1, name="other"), owner="bob")
    found = versions(site.repository.load())
    assert [(p.model, p.version, p.owner) for p in found] == [("lines", 1, "ada"), ("other", 1, "bob")]


def test_publishing_again_changes_nothing(site: Site) -> None:
    site.release(site.model(1))
    before = site.metadata("timestamp")
    site.release(site.model(1), enter=False)
    assert site.metadata("timestamp") == before


def test_withdrawn_parts_are_gone_and_shared_ones_stay(site: Site) -> None:
    shared = site.model(1)
    site.release(shared)
    site.release(site.model(2, shared.experts[0]))
    withdraw(site.repository, "lines", 2, [])
    assert [p.version for p in versions(site.repository.load())] == [1]
    assert site.update(1) == Installed("lines", 1, 0)
    with pytest.raises(UnknownError, match="lines version 2 is not in the repository"):
        bundle(site.repository, "lines", 2)


def test_a_golden_pair_that_two_versions_have_stays_with_the_one_that_stands(site: Site) -> None:
    """The same weights exported anew: another file, the same golden pair."""
    onnx, w = linear(1)
    again, _ = linear(1, padding=64)
    site.release(site.model(1, site.expert(onnx, golden_of(w))))
    model = site.release(site.model(2, site.expert(again, golden_of(w))))
    withdraw(site.repository, "lines", 2, parts_of(model))
    assert site.update(1) == Installed("lines", 1, 0)


@pytest.mark.parametrize(("keys", "threshold"), [(0, 0), (1, 2), (2, 0), (17, 1)])
def test_a_threshold_that_cannot_be_is_refused(site: Site, keys: int, threshold: int) -> None:
    with pytest.raises(RefusedError, match=r"a role has 1\.\.16 keys"):
        site.repository.rotate("targets", keys, threshold)
    with pytest.raises(UnknownError, match="no role owner-nobody; it has root, targets, snapshot, timestamp"):
        site.repository.rotate("owner-nobody")


def test_a_key_kept_elsewhere_is_missed_by_name_and_nothing_is_written(site: Site) -> None:
    site.release(site.model(1))
    roles = site.repository.load()
    for role in ("owner-ada", "root"):
        for keyid in roles.trusts(role).keyids:
            site.repository.keys.forget(keyid)
    before = site.metadata("timestamp")
    with pytest.raises(RefusedError, match="role owner-ada needs 1 signatures, 0 of its keys are in"):
        site.release(site.model(2), enter=False)
    keys = sorted((site.folder / "keys").glob("*.key"))
    with pytest.raises(RefusedError, match="role root needs 1 signatures, 0 of its keys are in"):
        site.repository.rotate("timestamp")
    assert site.metadata("timestamp") == before
    assert sorted((site.folder / "keys").glob("*.key")) == keys, "keys that nobody will ever use were left"


def test_what_is_about_to_expire_is_renewed_and_nothing_else(tmp_path: Path) -> None:
    now = [time.time() - LIFE_S["timestamp"] * 0.6]
    site = Site(tmp_path, clock=lambda: now[0])
    site.release(site.model(1))
    assert site.repository.refresh() == ([], {})
    now[0] = time.time()
    assert site.repository.refresh() == (["timestamp"], {})
    now[0] += LIFE_S["targets"] * 0.6
    assert set(site.repository.refresh()[0]) == {"targets", "owner-ada", "snapshot", "timestamp"}


@pytest.mark.parametrize("harm", [b"", b"{}", b'{"signed": 1}', b"\xff" * 100])
def test_damaged_metadata_is_told_by_name(site: Site, harm: bytes) -> None:
    site.repository.store.put("metadata/timestamp.json", harm)
    with pytest.raises(ConfigError, match=r"the repository's metadata/timestamp.json is missing or damaged"):
        site.repository.load()


def test_a_key_file_that_holds_something_else_is_told_by_name(site: Site) -> None:
    path = next((site.folder / "keys").glob("*.key"))
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match=f"{path.name}: not an Ed25519 private key"):
        site.repository.keys.signer(path.stem)


STORES = {"a folder": lambda tmp: str(tmp / "store"), "obstore": lambda tmp: "memory:///bmoe"}


@pytest.mark.parametrize("kind", STORES)
def test_every_store_keeps_its_promise(tmp_path: Path, kind: str) -> None:
    store = open_store(STORES[kind](tmp_path))
    assert isinstance(store, UrlStore if kind == "obstore" else FolderStore)
    source = tmp_path / "blob"
    source.write_bytes(os.urandom(100_000))
    data = source.read_bytes()
    assert store.size("metadata/timestamp.json") is None
    with pytest.raises(UnknownError, match=r"has no metadata/timestamp.json"):
        read_whole(store, "metadata/timestamp.json", 10)
    store.put("metadata/timestamp.json", b"old")
    store.put("metadata/timestamp.json", b"new")
    assert read_whole(store, "metadata/timestamp.json", 3) == b"new"
    with pytest.raises(InputError, match="more than the 2 bytes"):
        read_whole(store, "metadata/timestamp.json", 2)
    store.put_file(blob_path("ab"), source)
    store.put_file(blob_path("ab"), source)
    assert store.size(blob_path("ab")) == 100_000 and read_whole(store, blob_path("ab"), 1 << 20) == data
    assert b"".join(store.stream(blob_path("ab"), 99_990)) == data[99_990:]
    assert list(store.stream(blob_path("ab"), 100_000)) == []
    store.remove(blob_path("ab"))
    store.remove(blob_path("ab"))
    assert store.size(blob_path("ab")) is None
    for name in ("../secret", "/etc/passwd", "a/../../b", ".hidden", "", "a\\b", "a\0b"):
        with pytest.raises(InputError, match="is not the name of a file in a store"):
            store.put(name, b"")


def test_a_url_that_nothing_opens_and_a_store_out_of_reach_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gopher"):
        open_store("gopher://example")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BmoeError) as caught:
        open_store(tmp_path / "file").put("metadata/timestamp.json", b"")
    assert isinstance(caught.value, UnavailableError) and "File exists" in str(caught.value)
