"""Keys kept away from the gateway: what they must sign is carried there and back, and nothing else is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from release_site import Site
from test_repository import Dying

from bmoe.protocol.errors import BmoeError, ConfigError, InputError, RefusedError, UnknownError
from bmoe.storage.blobs import FolderStore
from bmoe.storage.publication import withdraw
from bmoe.storage.repository import LIFE_S, UnsignedError
from bmoe.storage.repository_drafts import described, read_drafts, sign_drafts, write_drafts
from bmoe.storage.repository_keys import read_public, read_signer, render_public, write_key
from bmoe.storage.updater import Installed

pytestmark = pytest.mark.usefixtures("unsynced")


class Elsewhere:
    """Another machine, with keys of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def key(self, name: str):  # type: ignore[no-untyped-def]
        """A new key; its public half, as the gateway reads it."""
        return read_public(json.loads(json.dumps(render_public(write_key(self.folder / name)))))

    def sign(self, file: bytes, *names: str) -> bytes:
        """The drafts, signed by these keys, each of which is one of a role's."""
        for name in names:
            file, signed = sign_drafts(file, read_signer(self.folder / name))
            assert signed
        return file


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path / "elsewhere")


def to_sign(change: Callable[[], object]) -> bytes:
    """The file of drafts that a change cannot do without."""
    with pytest.raises(UnsignedError) as caught:
        change()
    return write_drafts(caught.value.drafts, caught.value.signers)


def accept(site: Site, file: bytes) -> list[str]:
    return site.repository.accept(read_drafts(file)[0])


@pytest.fixture
def away(site: Site, elsewhere: Elsewhere) -> Site:
    """Ada keeps two of her three keys' worth of signatures elsewhere; a board has her version 1."""
    site.release(site.model(1))
    site.update(1)
    public = [elsewhere.key(name) for name in ("a", "b", "c")]
    file = to_sign(lambda: site.repository.rotate("owner-ada", threshold=2, public=public, draft=True))
    assert accept(site, elsewhere.sign(file, "a", "c"))
    return site


def drafted(site: Site, version: int = 2) -> bytes:
    """A version whose publication waits for ada's signatures."""
    model = site.model(version)
    return to_sign(lambda: site.release(model, enter=False, draft=True))


def test_an_owner_signs_her_release_on_another_machine(away: Site, elsewhere: Elsewhere) -> None:
    file = drafted(away)
    assert any("lines/2/model.json" in line for line in described(file))
    accept(away, elsewhere.sign(file, "b", "c"))
    away.release(away.model(2))
    assert away.update(2) == Installed("lines", 2, 1)
    file = to_sign(lambda: withdraw(away.repository, "lines", 2, [], draft=True))
    accept(away, elsewhere.sign(file, "a", "b"))
    away.release(away.model(1), enter=False)
    assert away.update(1) == Installed("lines", 1, 2)


def test_root_is_given_two_keys_that_never_lie_here_and_changes_every_role_from_there(
    installed: Site, elsewhere: Elsewhere
) -> None:
    site, public = installed, [elsewhere.key("a"), elsewhere.key("b")]
    file = to_sign(lambda: site.repository.rotate("root", threshold=2, public=public, draft=True))
    (gone,) = accept(site, elsewhere.sign(file, "a", "b"))
    assert site.repository.keys.signer(gone) is None
    for role in ("timestamp", "snapshot", "targets"):
        file = to_sign(lambda role=role: site.repository.rotate(role, keys=2, threshold=2, draft=True))
        assert site.update(1).changed is False  # type: ignore[union-attr]
        (gone,) = accept(site, elsewhere.sign(file, "a", "b"))
        assert site.repository.keys.signer(gone) is None
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)
    assert len(list((site.folder / "keys").glob("*.key"))) == 7, "two for each of three roles, and the owner's"


def test_targets_are_signed_elsewhere_and_a_new_owner_waits_for_them(installed: Site, elsewhere: Elsewhere) -> None:
    site = installed
    file = to_sign(lambda: site.repository.rotate("targets", public=[elsewhere.key("a")], draft=True))
    accept(site, elsewhere.sign(file, "a"))
    other = site.model(1, name="other")
    file = to_sign(lambda: site.release(other, "bob", enter=False, draft=True))
    accept(site, elsewhere.sign(file, "a"))
    site.release(other, "bob")
    assert site.update(1, name="other") == Installed("other", 1, 0)
    file = to_sign(lambda: site.repository.rotate("owner-bob", keys=2, threshold=2, draft=True))
    accept(site, elsewhere.sign(file, "a"))
    site.release(site.model(2, name="other"), "bob")
    assert site.update(2, name="other") == Installed("other", 2, 1)


@pytest.mark.parametrize("role", ["root", "timestamp", "targets"])
def test_a_keeper_that_dies_while_he_accepts_leaves_what_readers_can_use(
    tmp_path: Path, elsewhere: Elsewhere, role: str
) -> None:
    site = Site(tmp_path)
    site.release(site.model(1))
    file = to_sign(lambda: site.repository.rotate("root", public=[elsewhere.key("a")], draft=True))
    accept(site, elsewhere.sign(file, "a"))
    folder = site.folder / "repository"
    names = {"root": ("a", "b"), "timestamp": ("a",), "targets": ("a",)}[role]
    public = [elsewhere.key("b")] if role == "root" else []
    file = elsewhere.sign(to_sign(lambda: site.repository.rotate(role, public=public, draft=True)), *names)
    for writes in range(9):
        site.repository.store = Dying(folder, writes)
        try:
            accept(site, file)
            break
        except KeyboardInterrupt:
            pass
        site.repository.store = FolderStore(folder)
        site.board = tmp_path / f"board-{writes}"
        site.board.mkdir()
        assert site.update(1) == Installed("lines", 1, 0), "a new board cannot read what was left"
        if role == "targets":
            file = elsewhere.sign(to_sign(lambda: site.repository.rotate(role, draft=True)), "a")
    assert writes == {"root": 1, "timestamp": 3, "targets": 4}[role]
    site.repository.store = FolderStore(folder)
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)


def test_below_the_threshold_nothing_is_accepted(away: Site, elsewhere: Elsewhere) -> None:
    before = away.metadata("timestamp")
    file = elsewhere.sign(drafted(away), "a")
    with pytest.raises(RefusedError, match="role owner-ada needs 2 signatures"):
        accept(away, file)
    assert away.metadata("timestamp") == before
    accept(away, elsewhere.sign(file, "b"))


def test_what_was_changed_after_it_was_signed_is_not_accepted(away: Site, elsewhere: Elsewhere) -> None:
    file = elsewhere.sign(drafted(away), "a", "b")
    values = json.loads(file)
    values["documents"]["owner-ada"]["signed"]["expires"] = "2099-01-01T00:00:00Z"
    with pytest.raises(RefusedError, match="role owner-ada needs 2 signatures"):
        accept(away, json.dumps(values).encode())


def test_a_draft_that_was_overtaken_or_has_expired_is_made_anew(away: Site, elsewhere: Elsewhere) -> None:
    early = elsewhere.sign(drafted(away), "a", "b")
    accept(away, elsewhere.sign(drafted(away, 3), "a", "b"))
    with pytest.raises(RefusedError, match="owner-ada is at version 3 by now, the draft is 3: make it anew"):
        accept(away, early)
    late = elsewhere.sign(drafted(away, 4), "a", "b")
    now = away.repository._clock
    away.repository._clock = lambda: now() + LIFE_S["targets"] + 60
    with pytest.raises(RefusedError, match="the draft of owner-ada expired on"):
        accept(away, late)


def edited(file: bytes, role: str, targets: dict[str, object]) -> bytes:
    values = json.loads(file)
    values["documents"][role]["signed"]["targets"].update(targets)
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("other/1/model.json", "is no target of owner-ada's"),
        ("lines/x/model.json", "is no target of owner-ada's"),
        ("lines/9/model.json", "the store has None bytes of it, 7 are stated: publish it again"),
    ],
)
def test_an_owner_signs_for_her_own_models_and_for_files_that_are_there(
    away: Site, elsewhere: Elsewhere, path: str, reason: str
) -> None:
    target = {"length": 7, "hashes": {"sha256": "0" * 64}}
    file = elsewhere.sign(edited(drafted(away), "owner-ada", {path: target}), "a", "b")
    with pytest.raises(RefusedError, match=reason):
        accept(away, file)


def test_a_root_that_the_one_before_does_not_know_is_not_accepted(site: Site, elsewhere: Elsewhere) -> None:
    public = [elsewhere.key("a")]
    file = to_sign(lambda: site.repository.rotate("root", public=public, draft=True))
    values = json.loads(elsewhere.sign(file, "a"))
    values["documents"]["root"]["signatures"] = [
        one for one in values["documents"]["root"]["signatures"] if one["keyid"] == public[0].keyid
    ]
    with pytest.raises(RefusedError, match="the draft of root is not signed by the keys that it has today"):
        accept(site, json.dumps(values).encode())


def test_what_is_signed_at_every_change_is_not_signed_elsewhere(site: Site, elsewhere: Elsewhere) -> None:
    with pytest.raises(RefusedError, match="timestamp is signed at every change: its keys must be in"):
        site.repository.rotate("timestamp", public=[elsewhere.key("a")])
    timestamp = {"timestamp": json.loads(site.metadata("timestamp"))}
    file = json.dumps({"format": 1, "documents": timestamp, "signers": {}}).encode()
    with pytest.raises(InputError, match="a draft of timestamp of type timestamp is none to sign elsewhere"):
        accept(site, file)
    with pytest.raises(UnknownError, match="the repository has no role owner-eve"):
        site.repository.accept({"owner-eve": b'{"signatures": [], "signed": {"_type": "targets", "spec_version": "1.0.31",'
                                b' "version": 1, "expires": "2099-01-01T00:00:00Z", "targets": {}}}'})  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1, "documents": {"root": 7}, "signers": {}}',
        b'{"format": 1, "documents": {}, "signers": []}',
    ],
)  # fmt: skip
def test_a_file_that_holds_no_drafts_is_told(data: bytes) -> None:
    with pytest.raises(InputError):
        read_drafts(data)


@pytest.mark.parametrize(
    "values", [{}, [], {"keyid": "00", "keyval": {"public": "00" * 32}}, {"keyval": {"public": 7}}]
)
def test_a_file_that_holds_no_public_key_is_told(values: object) -> None:
    with pytest.raises(InputError, match="not a public key as `bmoe release new-key` writes it"):
        read_public(values)


def test_a_key_is_not_written_over_and_another_file_is_none(elsewhere: Elsewhere) -> None:
    elsewhere.key("a")
    with pytest.raises(RefusedError, match="is there already"):
        elsewhere.key("a")
    with pytest.raises(ConfigError, match="not an Ed25519 private key in PEM"):
        read_signer(elsewhere.folder / "none")


def test_what_only_keys_elsewhere_can_renew_is_named_in_time_and_renewed(away: Site, elsewhere: Elsewhere) -> None:
    now = away.repository._clock
    away.repository._clock = lambda: now() + LIFE_S["targets"] * 0.6
    renewed, waiting = away.repository.refresh()
    assert set(renewed) == {"targets", "snapshot", "timestamp"} and list(waiting) == ["owner-ada"]
    assert 71 < waiting["owner-ada"] < 73
    file = write_drafts(*away.repository.renewals())
    accept(away, elsewhere.sign(file, "a", "c"))
    assert away.repository.refresh() == ([], {}) and away.repository.renewals() == ({}, {})


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "owner-ada"])
def test_a_lost_key_is_replaced_as_long_as_those_that_name_it_are_there(installed: Site, role: str) -> None:
    site = installed
    (lost,) = site.repository.load().trusts(role).keyids
    site.repository.keys.forget(lost)
    with pytest.raises(BmoeError, match=f"role {role} needs 1 signatures"):
        site.release(site.model(2), "ada", enter=False) if role != "targets" else site.release(
            site.model(1, name="other"), "bob", enter=False
        )
    site.repository.rotate(role, keys=3, threshold=2)
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_keeper_that_dies_while_he_replaces_a_lost_key_replaces_it_again(installed: Site, role: str) -> None:
    site, folder = installed, installed.folder / "repository"
    for keyid in site.repository.load().trusts(role).keyids:
        site.repository.keys.forget(keyid)
    for writes in range(9):
        site.repository.store = Dying(folder, writes)
        try:
            site.repository.rotate(role)
            break
        except KeyboardInterrupt:
            continue
    assert writes >= 3
    site.repository.store = FolderStore(folder)
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)


def test_a_role_of_three_keys_and_a_threshold_of_two_is_changed_with_one_of_them_lost(installed: Site) -> None:
    site = installed
    for role in ("root", "targets", "timestamp", "owner-ada"):
        site.repository.rotate(role, keys=3, threshold=2)
    for role in ("owner-ada", "timestamp", "targets", "root"):
        site.repository.keys.forget(site.repository.load().trusts(role).keyids[0])
        site.repository.rotate(role, keys=2, threshold=2)
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)
