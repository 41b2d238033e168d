"""Attacks by whoever can write to the store of a repository: the keeper signs nothing of his, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from release_site import Site, golden_of, linear, parts_of
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from bmoe.protocol.errors import BmoeError, ConfigError, InputError, LimitError, UnavailableError
from bmoe.storage.blobs import FolderStore
from bmoe.storage.publication import bundle, fetch, read_version, versions, withdraw
from bmoe.storage.repository import Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import blob_path, metadata_path
from bmoe.storage.updater import Installed

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def site(installed: Site) -> Site:
    return installed


def spoil(site: Site, name: str, key: CryptoSigner | None = None) -> None:
    """One more target, delegation or version in a metadata file, signed by a stranger's key or not anew at all."""
    values = json.loads(site.metadata(name))
    signed = values["signed"]
    if "targets" in name or "owner" in name:
        signed["targets"]["lines/9/model.json"] = {"length": 1, "hashes": {"sha256": "0" * 64}}
    else:
        signed["expires"] = "2099-01-01T00:00:00Z"
    data = json.dumps(values).encode()
    if key is not None:
        metadata: Metadata[object] = Metadata.from_bytes(data)  # type: ignore[type-var]
        metadata.sign(key)
        data = metadata.to_bytes()
    site.repository.store.put(metadata_path(name), data)


@pytest.mark.parametrize(
    "key", [None, CryptoSigner.generate_ed25519()], ids=["signed as before", "signed by a stranger"]
)
@pytest.mark.parametrize("role", ["1.root", "timestamp", "snapshot", "targets", "owner-ada"])
def test_metadata_that_the_right_keys_did_not_sign_are_not_signed_anew(
    site: Site, role: str, key: CryptoSigner | None
) -> None:
    roles = site.repository.load()
    name = role if role in ("1.root", "timestamp") else f"{roles.named(role).signed.version}.{role}"
    spoil(site, name, key)
    before = {path.name: path.read_bytes() for path in (site.folder / "repository" / "metadata").iterdir()}
    with pytest.raises(
        ConfigError, match=rf"metadata/{name}.json is missing or damaged: of the right keys 0 signed it"
    ):
        site.release(site.model(2), enter=False)
    with pytest.raises(ConfigError, match="restore it"):
        site.repository.refresh()
    assert {p.name: p.read_bytes() for p in (site.folder / "repository" / "metadata").iterdir()} == before


def test_a_root_of_a_strangers_is_neither_followed_nor_begun_with(site: Site, tmp_path: Path) -> None:
    stranger = Repository(FolderStore(tmp_path / "stranger"), KeyFolder(tmp_path / "stranger keys"))
    stranger.found()
    shutil.copytree(tmp_path / "stranger" / "metadata", site.folder / "repository" / "metadata", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="the repository's first root is another than the one made here"):
        site.repository.load()


def test_a_root_put_behind_the_newest_is_not_followed(site: Site) -> None:
    values = json.loads(site.metadata("1.root"))
    values["signed"]["version"] = 2
    root: Metadata[object] = Metadata.from_bytes(json.dumps(values).encode())  # type: ignore[type-var]
    root.sign(CryptoSigner.generate_ed25519())
    site.repository.store.put(metadata_path("2.root"), root.to_bytes())
    with pytest.raises(ConfigError, match=r"metadata/2.root.json is missing or damaged"):
        site.repository.load()


def test_the_state_of_yesterday_is_not_gone_on_from(site: Site) -> None:
    """A withdrawal undone: the store is put back to before it."""
    yesterday = site.folder / "yesterday"
    shutil.copytree(site.folder / "repository", yesterday)
    withdraw(site.repository, "lines", 1, parts_of(site.model(1)))
    (site.folder / "repository" / "metadata" / "timestamp.json").write_bytes(
        (yesterday / "metadata" / "timestamp.json").read_bytes()
    )
    with pytest.raises(
        ConfigError, match=r"timestamp is version 2, but 3 was signed here: restore the newest, or remove"
    ):
        site.release(site.model(2), enter=False)
    (site.folder / "keys" / "newest.json").unlink()
    assert [p.version for p in versions(site.repository.load())] == [1], "the operator said to go on from it"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"timestamp": null}', b"\xff"])
def test_a_damaged_memory_is_told_by_name(site: Site, data: bytes) -> None:
    (site.folder / "keys" / "newest.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"newest.json is damaged: remove it"):
        site.repository.load()


def test_a_manifest_tampered_with_in_the_store_is_not_read(site: Site) -> None:
    site.release(site.model(2))
    found, _ = read_version(site.repository, site.repository.load(), "lines", 1)
    other, _ = read_version(site.repository, site.repository.load(), "lines", 2)
    blobs = site.folder / "repository" / "blobs"
    (blobs / found.manifest).unlink()  # it may be a link to what the gateway serves
    (blobs / found.manifest).write_bytes((blobs / other.manifest).read_bytes())
    for act in (lambda: bundle(site.repository, "lines", 1), lambda: withdraw(site.repository, "lines", 2, [])):
        with pytest.raises(InputError, match="it was tampered with"):
            act()


def test_a_blob_damaged_in_a_folder_is_replaced_by_publishing_again(site: Site) -> None:
    (part,) = parts_of(site.model(1))
    path = site.folder / "repository" / blob_path(part)
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(bytes(size))
    site.release(site.model(1), enter=False)
    site.board = site.folder / "another board"
    site.board.mkdir()
    assert site.update(1) == Installed("lines", 1, 0)


class Breaking(FolderStore):
    """A store whose answers break off after so many bytes; `dead` ones bring nothing."""

    limit, dead = 20_000, False

    def stream(self, path: str, offset: int = 0) -> Iterator[bytes]:
        left = 0 if self.dead else self.limit
        for chunk in super().stream(path, offset):
            yield chunk[:left]
            left -= len(chunk)
            if left < 0:
                raise UnavailableError("the store said nothing for 30 s")


def test_a_blob_is_brought_from_a_store_that_breaks_off_and_not_from_one_that_brings_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmoe.storage.blobs.CHUNK_BYTES", 7_000)
    onnx, w = linear(5, padding=100_000)
    (part,) = parts_of(site.release(site.model(2, site.expert(onnx, golden_of(w)))))
    store = site.repository.store = Breaking(site.folder / "repository")
    fetch(site.repository, part, tmp_path / "here")
    assert (tmp_path / "here" / part).read_bytes() == onnx
    with pytest.raises(LimitError, match="has more than 30000 bytes"):
        fetch(site.repository, part, tmp_path / "there", 30_000)
    store.dead = True
    with pytest.raises(UnavailableError):
        fetch(site.repository, part, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_a_bundle_is_of_one_moment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is published just after the metadata was read."""
    load = site.repository.load

    def slow(lenient: str = ""):  # type: ignore[no-untyped-def]
        found = load(lenient)
        monkeypatch.undo()
        site.release(site.model(2), enter=False)
        return found

    monkeypatch.setattr(site.repository, "load", slow)
    made = bundle(site.repository, "lines", 1)
    named = json.loads(made.metadata["metadata/timestamp.json"])["signed"]["meta"]["snapshot.json"]["version"]
    assert f"metadata/{named}.snapshot.json" in made.metadata


def test_metadata_that_nobody_would_read_is_not_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmoe.storage.repository.METADATA_BYTES", 2_000)
    with pytest.raises(LimitError, match=r"owner-ada would have \d+ bytes, at most 2000 are read: withdraw some"):
        for version in range(2, 9):
            site.release(site.model(version), enter=False)
    monkeypatch.undo()
    assert site.update(1) == Installed("lines", 1, 0, changed=False), "what was there before stands"


def test_every_fault_of_the_store_is_one_of_ours(site: Site) -> None:
    """Each metadata file that counts cut, emptied, doubled or made noise."""
    for name in site.repository.load().read:
        path = site.folder / "repository" / name
        data = path.read_bytes()
        for harm in (b"", data[: len(data) // 2], data + data, os.urandom(200), b"[" * 100_000):
            path.write_bytes(harm)
            with pytest.raises(BmoeError):
                site.repository.load()
        path.write_bytes(data)
    assert site.repository.load()
