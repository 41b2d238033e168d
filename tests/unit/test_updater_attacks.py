"""Attacks on updates: whoever holds the repository, one of its keys, or the line, gets nothing onto a board.

Each is an honest version installed, the attack, the refusal in one line, and the old version still whole.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import onnx_models as onnx
import pytest
from release_site import CLASSES, COLUMNS, EPSILON, Site, golden_of, linear, parts_of
from test_hostile_models import nested_graphs
from tuf.api.metadata import Metadata, TargetFile

from bmoe.ledger.rules.receipt_format import parse_receipt
from bmoe.protocol.errors import RefusedError, UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import ModelRelease, Release, open_message, seal_message
from bmoe.storage.blobs import FolderStore
from bmoe.storage.manifest import TensorSpec, render_manifest
from bmoe.storage.origin import make_origin
from bmoe.storage.publication import publish, withdraw
from bmoe.storage.repository import LIFE_S, Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.repository_roles import Roles
from bmoe.storage.targets import blob_path, model_receipt_path, release_receipt_path
from bmoe.storage.update_ledger import Word, _part
from bmoe.storage.updater import Installed
from edge_agent.self_test import reproduces_golden

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def site(installed: Site) -> Site:
    """A board with version 1 of ada's model installed."""
    return installed


def test_rolled_back_metadata_is_refused(site: Site) -> None:
    old = site.metadata("timestamp")
    site.release(site.model(2))
    assert site.update(2) == Installed("lines", 2, 1)
    site.spoiled["metadata/timestamp.json"] = old
    site.stays("the repository went back to older metadata", version=1, installed=2)


def test_an_old_snapshot_under_a_new_timestamp_is_refused(site: Site) -> None:
    old = site.metadata(f"{site.repository.load().snapshot.signed.version}.snapshot")
    site.release(site.model(2))
    site.spoiled[f"metadata/{site.repository.load().snapshot.signed.version}.snapshot.json"] = old
    site.stays("metadata")


def test_frozen_metadata_blocks_updates_and_nothing_else(tmp_path: Path) -> None:
    now = time.time()
    site = Site(tmp_path, clock=lambda: now - LIFE_S["timestamp"] - 60)
    site.release(site.model(1))
    assert site.stays("out of date", version=1, installed=0).again
    site.repository._clock = time.time
    assert site.repository.refresh() == (["timestamp"], {})
    assert site.update(1) == Installed("lines", 1, 0)


@pytest.mark.parametrize("harm", ["a bit flipped", "cut short", "more behind it"])
def test_a_tampered_blob_is_refused(site: Site, harm: str) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    data = site.read(blob_path(part), 1 << 20)
    spoiled = {
        "a bit flipped": data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "cut short": data[:-1],
        "more behind it": data + b"\0",
    }
    site.spoiled[blob_path(part)] = spoiled[harm]
    said = {"a bit flipped": "tampered", "cut short": f"{len(data) - 1} of {len(data)}", "more behind it": "more than"}
    site.stays(said[harm])
    site.spoiled.clear()
    assert site.update(2) == Installed("lines", 2, 1), "once the line is honest, the update goes on"


def test_a_blob_without_end_is_cut_off(site: Site) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    site.spoiled[blob_path(part)] = bytes(8 << 20)
    site.stays("more than the")
    assert site.reads[blob_path(part)] < 1 << 20


def test_another_owners_key_signs_nothing_of_hers(site: Site) -> None:
    site.release(site.model(1, name="other"), owner="bob")
    site.release(site.model(2))
    roles = site.repository.load()
    ada = roles.owners["owner-ada"]
    ada.signatures.clear()
    for keyid in roles.trusts("owner-bob").keyids:
        signer = site.repository.keys.signer(keyid)
        assert signer is not None
        ada.sign(signer, append=True)
    site.spoiled[f"metadata/{ada.signed.version}.owner-ada.json"] = ada.to_bytes()
    site.stays("too few of the right keys signed")


def test_an_owner_publishes_nothing_in_anothers_name(site: Site) -> None:
    """Bob writes a target of ada's model into his own metadata, and signs it as he may."""
    site.release(site.model(1, name="other"), owner="bob")
    model = site.model(2)

    def slip_in(roles):  # type: ignore[no-untyped-def]
        hers, his = roles.owners["owner-ada"].signed, roles.owners["owner-bob"].signed
        his.targets["lines/2/model.json"] = hers.targets["lines/1/model.json"]
        roles.changed.add("owner-bob")

    site.repository.change(slip_in)
    site.enter(model)
    site.stays("lines/2/model.json is not in the repository: withdrawn, or never published by the model's owner")


def test_below_the_threshold_nothing_counts(site: Site) -> None:
    site.repository.rotate("owner-ada", keys=2, threshold=2)
    site.release(site.model(2))
    version = site.repository.load().owners["owner-ada"].signed.version
    path = f"metadata/{version}.owner-ada.json"
    metadata = Metadata.from_bytes(site.metadata(f"{version}.owner-ada"))
    metadata.signatures.popitem()
    site.spoiled[path] = metadata.to_bytes()
    site.stays("too few of the right keys signed")


def test_a_stolen_key_signs_twice_and_still_counts_once(site: Site) -> None:
    site.repository.rotate("owner-ada", keys=2, threshold=2)
    site.release(site.model(2))
    version = site.repository.load().owners["owner-ada"].signed.version
    text = site.metadata(f"{version}.owner-ada").decode()
    keys = list(Metadata.from_bytes(text.encode()).signatures)
    site.spoiled[f"metadata/{version}.owner-ada.json"] = text.replace(keys[1], keys[0]).encode()
    site.stays("metadata")


def test_keys_that_were_rotated_out_sign_nothing_any_more(site: Site) -> None:
    stolen = site.folder / "stolen"
    stolen.mkdir()
    for path in (site.folder / "keys").glob("*.key"):
        (stolen / path.name).write_bytes(path.read_bytes())
    old = site.repository.load()
    site.repository.rotate("owner-ada")
    new = site.repository.load().owners["owner-ada"]
    new.signatures.clear()
    site.repository.keys.folder = stolen
    (keyid,) = old.trusts("owner-ada").keyids
    signer = site.repository.keys.signer(keyid)
    assert signer is not None
    new.sign(signer)
    site.spoiled[f"metadata/{new.signed.version}.owner-ada.json"] = new.to_bytes()
    site.stays("too few of the right keys signed")


def test_with_every_key_of_the_repository_but_no_ledger_entry_nothing_slips_in(site: Site) -> None:
    site.release(site.model(2), enter=False)
    site.stays("the ledger has no final entry for it: no model for lines 2 stands on this ledger")


def test_other_bytes_under_an_entered_version_are_refused(site: Site) -> None:
    """The ledger has version 2; the thief of the repository's keys publishes another version 2."""
    onnx_file, w = linear(99)
    site.enter(site.model(2))
    model = site.model(2, site.expert(onnx_file, golden_of(w)))
    publish(site.repository, "ada", model, render_manifest(model), site.blobs, b"{}")
    site.stays("the ledger has lines 2 with another manifest or other parts")


def test_the_same_experts_under_another_manifest_are_refused(site: Site) -> None:
    """Labels swapped, or limits widened, by a thief of the repository's keys."""
    model = site.model(2)
    site.enter(model)
    other = replace(model, description="the same, and other labels")
    publish(site.repository, "ada", other, render_manifest(other), site.blobs, make_origin(other, {}))
    site.stays("the ledger has lines 2 with another manifest or other parts")


def _in_the_metadata(site: Site, path: str, target: TargetFile) -> None:
    """Whoever has the owner's key says something of his own of a target."""

    def say(roles: Roles) -> None:
        roles.owners["owner-ada"].signed.targets[path] = target
        roles.changed.add("owner-ada")

    site.repository.change(say)


def test_metadata_that_say_something_else_of_a_file_than_its_manifest_are_refused(site: Site) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    path = f"lines/one/{part}.onnx"
    _in_the_metadata(site, path, TargetFile(7, {"sha256": "0" * 64}, path))
    site.stays("the repository's metadata says of lines/one/")


def test_the_manifest_of_another_version_in_its_place_is_refused(site: Site) -> None:
    site.release(site.model(2))
    targets = site.repository.load().owners["owner-ada"].signed.targets
    _in_the_metadata(site, "lines/2/model.json", targets["lines/1/model.json"])
    site.stays("the manifest is of lines 1, not of lines 2")


@pytest.mark.parametrize("length", [0, (1 << 20) + 1])
def test_a_manifest_without_end_or_without_bytes_is_refused_before_it_is_fetched(site: Site, length: int) -> None:
    site.release(site.model(2))
    _in_the_metadata(site, "lines/2/model.json", TargetFile(length, {"sha256": "0" * 64}, "lines/2/model.json"))
    site.stays(f"the manifest has {length} bytes, at most")


def test_a_manifest_named_by_no_sha256_is_refused(site: Site) -> None:
    site.release(site.model(2))
    _in_the_metadata(site, "lines/2/model.json", TargetFile(9, {"sha512": "0" * 128}, "lines/2/model.json"))
    site.stays("the repository names the manifest by no SHA-256")


def test_tolerances_other_than_those_entered_are_refused(site: Site) -> None:
    """The ledger's release of the part is narrower than what the version's manifest, entered too, would have."""
    model = site.model(2)
    site.release(model)
    (part,) = parts_of(model)
    wide = replace(model.experts[0], outputs=(TensorSpec("y", "float32", (None, CLASSES), 1.0),))
    with pytest.raises(
        RefusedError, match=f"the ledger's release of {part[:16]} is not what the manifest says of one.onnx"
    ):
        _part(site, Word(site.ledger.fleet.trust), model, wide)


def test_an_entry_that_is_not_final_yet_is_waited_for(site: Site) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    waiting = UnavailableError("not under a cosigned checkpoint yet: ask again later")
    site.spoiled[model_receipt_path("lines", 2)] = site.spoiled[release_receipt_path(part)] = waiting
    assert site.stays("its entry is not final yet").again


def test_an_entry_that_too_few_validators_cosigned_is_not_final(site: Site) -> None:
    site.release(site.model(2))
    path = model_receipt_path("lines", 2)
    text = site.read(path, 1 << 20).decode()
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("— validator-3", "— validator-4"))]
    assert len(kept) == len(lines) - 2 and parse_receipt("".join(kept))
    site.spoiled[path] = "".join(kept).encode()
    site.stays("a quorum of 3 validators must have cosigned, found 2")


def test_a_receipt_of_another_version_proves_nothing(site: Site) -> None:
    site.release(site.model(2), enter=False)
    site.spoiled[model_receipt_path("lines", 2)] = site.read(model_receipt_path("lines", 1), 1 << 20)
    site.stays("the ledger's entry is of lines 1")


def test_committed_takes_the_registrars_statement_and_final_does_not(site: Site) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    waiting = UnavailableError("not under a cosigned checkpoint yet: ask again later")
    state = site.ledger.fleet.state
    for path, statement in (
        (model_receipt_path("lines", 2), state.version_statements[("lines", 2)]),
        (release_receipt_path(part), state.release_statements[bytes.fromhex(part)]),
    ):
        site.spoiled[path], site.spoiled[path.replace("receipts", "statements")] = waiting, statement
    site.stays("its entry is not final yet")
    assert site.update(2, word=Word(site.ledger.fleet.trust, "committed")) == Installed("lines", 2, 1)


@pytest.mark.parametrize("harm", ["another key", "another ledger"])
def test_committed_takes_no_statement_but_the_registrars_of_this_ledger(site: Site, harm: str) -> None:
    """A gateway that has lost its mind, or its keys, states by itself what the ledger has."""
    (part,) = parts_of(site.release(site.model(2)))
    fleet = site.ledger.fleet
    waiting = UnavailableError("not under a cosigned checkpoint yet: ask again later")
    for path, kind, sealed in (
        (model_receipt_path("lines", 2), ModelRelease, fleet.state.version_statements[("lines", 2)]),
        (release_receipt_path(part), Release, fleet.state.release_statements[bytes.fromhex(part)]),
    ):
        header = open_message(kind, sealed).header
        signer, ledger = (Signer.generate(), header.ledger) if harm == "another key" else (fleet.registrar, b"x" * 16)
        site.spoiled[path] = waiting
        site.spoiled[path.replace("receipts", "statements")] = seal_message(signer, replace(header, ledger=ledger))
    site.stays(
        {"another key": "signature", "another ledger": "the statement is of ledger"}[harm],
        word=Word(fleet.trust, "committed"),
    )


def test_a_repository_founded_anew_by_another_is_not_followed(site: Site, tmp_path: Path) -> None:
    """All of it is good by itself, and signed by other keys than those that the board began with."""
    model = site.model(2)
    site.enter(model)
    site.repository = Repository(FolderStore(tmp_path / "another"), KeyFolder(tmp_path / "other keys"))
    site.repository.found()
    site.release(model, enter=False)
    assert site.stays("too few of the right keys signed the repository's metadata").step == "metadata"


def test_a_withdrawn_version_is_not_installed(site: Site) -> None:
    (part,) = parts_of(site.release(site.model(2)))
    withdraw(site.repository, "lines", 2, [part])
    site.stays("lines/2/model.json is not in the repository: withdrawn")
    site.release(site.model(3))
    assert site.update(3) == Installed("lines", 3, 1)


def test_a_huge_blob_is_refused_before_it_is_fetched(site: Site) -> None:
    onnx_file, w = linear(2, padding=(1 << 20) + 1)
    (part,) = parts_of(site.release(site.model(2, site.expert(onnx_file, golden_of(w)))))
    site.stays(f"has {len(onnx_file)} bytes, this board takes {1 << 20}")
    assert blob_path(part) not in site.reads


def test_more_memory_than_the_board_has_is_refused(site: Site) -> None:
    onnx_file, w = linear(2)
    site.release(site.model(2, site.expert(onnx_file, golden_of(w), memory_mb=4096)))
    site.stays("one.onnx needs 4096 MB of memory, this board gives 256")


X = onnx.value("x", onnx.FLOAT, ["N", COLUMNS])
Y = onnx.value("y", onnx.FLOAT, ["N", CLASSES])


def _external(location: str) -> bytes:
    weights = onnx.external_tensor("w", [COLUMNS, CLASSES], location)
    return onnx.model(onnx.graph([onnx.node("MatMul", ["x", "w"], ["y"])], [X], [Y], [weights]))


def _foreign(domain: str, opset: bool) -> bytes:
    operator = onnx.node("Steal", ["x"], ["y"]) + onnx.field(7, domain)
    imported = onnx.field(8, onnx.field(1, domain) + onnx.field(2, 1)) if opset else b""
    return onnx.model(onnx.graph([operator], [X], [Y])) + imported


HOSTILE = {
    "a bomb of 5,000 nested graphs": (nested_graphs(5000), "more than 24 deep"),
    "nodes of nothing": (onnx.model(onnx.field(1, b"") * 10_000), "one.onnx"),
    "external data by traversal": (_external("../../etc/shadow"), "outside its folder"),
    "external data by an absolute path": (_external("/etc/shadow"), "outside its folder"),
    "external data beside it": (_external("weights.bin"), "another file"),
    "a custom-op library's operator": (_foreign("evil.ops", True), "needs a library that boards do not load"),
    "an operator of a domain not imported": (_foreign("evil.ops", False), "needs a library that boards do not load"),
    "an engine compiled for one accelerator": (
        onnx.model(onnx.graph([onnx.node("EPContext", ["x"], ["y"]) + onnx.field(7, "com.microsoft")], [X], [Y])),
        "code compiled for one accelerator",
    ),
    "no model at all": (b"#!/bin/sh\nrm -rf /\n" * 100, "one.onnx"),
}


@pytest.mark.parametrize("story", HOSTILE)
def test_an_expert_made_to_harm_is_refused_though_its_owner_and_the_ledger_have_it(site: Site, story: str) -> None:
    data, reason = HOSTILE[story]
    site.release(site.model(2, site.expert(data, golden_of(linear(2)[1]))))
    refused = site.stays(reason, file_bytes=16 << 20)
    assert refused.step == "check" and site.tested == ["one"], "it was never run"


def test_an_operator_that_onnxruntime_does_not_know_fails_the_self_test(site: Site) -> None:
    data = onnx.model(onnx.graph([onnx.node("Stael", ["x"], ["y"])], [X], [Y]))
    site.release(site.model(2, site.expert(data, golden_of(linear(2)[1]))))
    assert site.stays("Stael", self_test=reproduces_golden).step == "self-test"


def test_a_bad_golden_pair_fails_the_self_test_and_a_good_one_passes(site: Site) -> None:
    data, w = linear(2)
    site.release(site.model(2, site.expert(data, golden_of(w + 0.01))))
    refused = site.stays("does not reproduce its golden pair here: output y differs by", self_test=reproduces_golden)
    assert refused.step == "self-test" and not refused.again
    site.release(site.model(3, site.expert(data, golden_of(w))))
    assert site.update(3, self_test=reproduces_golden) == Installed("lines", 3, 1)


def test_a_golden_pair_that_unpacks_to_gigabytes_is_refused(site: Site) -> None:
    data, w = linear(2)
    bomb = bytearray(golden_of(w))
    # The size of a member unpacked, as the archive's directory states it (APPNOTE 4.3.12).
    bomb[(place := bomb.rindex(b"PK\x01\x02") + 24) : place + 4] = (1 << 30).to_bytes(4, "little")
    site.release(site.model(2, site.expert(data, bytes(bomb))))
    site.stays("expected at most", self_test=reproduces_golden)


def test_an_expert_that_declares_other_outputs_than_it_has_is_refused(site: Site) -> None:
    data, w = linear(2)
    outputs = (TensorSpec("y", "float32", (None, CLASSES + 1), EPSILON),)
    site.release(site.model(2, site.expert(data, golden_of(w), outputs=outputs)))
    assert site.stays("the manifest declares output 'y'").step == "check"
