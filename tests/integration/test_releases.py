"""Releases on a real gateway and a real board: published, held, served, withdrawn, keys rotated, fetched and verified."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from rollout_load import Load, X, until
from typer.testing import CliRunner

from benchmarks.fleet import AgentSpec, LocalFleet
from bmoe.protocol.errors import BmoeError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.tls import mutual_tls
from bmoe.storage.installed import read_record
from bmoe.storage.manifest import Model, TensorSpec, load_model, manifest_digest, parts, render_manifest
from bmoe.storage.repository import LIFE_S
from bmoe.storage.targets import model_receipt_path, release_receipt_path
from bmoe.storage.update_ledger import Word, check_entered
from coordinator.cli.admin import Admin
from coordinator.cli.commands import app
from coordinator.config import load_settings
from coordinator.identity.shelf import open_repository
from coordinator.state_layout import StateLayout
from edge_agent.fleet import FleetClient
from edge_agent.identity import load_identity
from edge_agent.wanted import FOLDER, Result, Wanted, read_result, write_wanted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from release_site import Site, golden_of, linear

pytestmark = pytest.mark.asyncio(loop_scope="module")
# A machine that runs many tests is slow at times, for reasons of its own.
NOISY = ("--limit", "tasks=5", "--limit", "latency_s=5")


def write_model(folder: Path, version: int, name: str = "lines", columns: int = 4) -> np.ndarray:
    """A model folder whose only expert is y = x @ w, x of so many columns; and w."""
    folder.mkdir()
    site = Site.__new__(Site)
    site.blobs = folder
    onnx, w = linear(version, columns=columns)
    expert = site.expert(onnx, golden_of(w), inputs=(TensorSpec("x", "float32", (None, columns)),))
    model: Model = site.model(version, expert, name)
    for part in parts(model):
        os.replace(folder / part.sha256, folder / part.file)
    (folder / "model.json").write_bytes(render_manifest(model))
    return w


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalFleet]:
    folder = tmp_path_factory.mktemp("releases")
    fleet = LocalFleet(folder / "fleet", [AgentSpec("board-1", "owner-1"), AgentSpec("board-2", "owner-2")])
    async with fleet:
        await fleet.start()
        yield fleet


async def release(fleet: LocalFleet, *words: str, fails: bool = False) -> str:
    """What `bmoe release ...` says."""
    return await command(*words, "--state", str(fleet.state), fails=fails)


async def rollout(fleet: LocalFleet, *words: str, fails: bool = False) -> str:
    """What `bmoe rollout ...` says."""
    return await command(*words, "--state", str(fleet.state), fails=fails, group="rollout")


async def command(*words: str, fails: bool = False, group: str = "release") -> str:
    """What `bmoe release ...` says on a machine that need not be a gateway's; in this process, which has it loaded."""
    done = await asyncio.to_thread(lambda: CliRunner().invoke(app, [group, *words]))
    assert (done.exit_code != 0) is fails, (done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, BmoeError), done.exception
    return done.output + str(done.exception or "")


async def answer(fleet: LocalFleet) -> np.ndarray:
    client = fleet.client()
    return (await asyncio.to_thread(lambda: client.infer("lines", {"x": X}))).outputs["y"]


async def test_a_release_is_published_held_served_withdrawn_and_its_keys_rotated(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    first, _, third = (write_model(tmp_path / f"v{v}", v) for v in (1, 2, 3))
    said = await release(fleet, "publish", str(tmp_path / "v1"), "--owner", "ada")
    assert "published lines version 1" in said and "not final" not in said
    assert np.allclose(await answer(fleet), X @ first, atol=1e-5)

    said = await release(fleet, "publish", str(tmp_path / "v2"), "--owner", "ada")
    assert "waits for its rollout" in said
    assert np.allclose(await answer(fleet), X @ first, atol=1e-5), "a held version was served"
    said = await release(fleet, "publish", str(tmp_path / "v3"), "--owner", "ada", "--serve", fails=True)
    assert "a rollout of lines 2 is under way (paused): let it end, or abort it first" in said
    rows = {row["version"]: row for row in Admin(fleet.state).call("GET", "/v1/admin/releases")["releases"]}
    assert (rows[1]["state"], rows[2]["state"]) == ("in use", "rollout paused")

    said = await release(fleet, "show", "lines", "2")
    assert "final on the ledger" in said and "owner     ada, 1 of 1 keys sign" in said
    statement = json.loads(await release(fleet, "show", "lines", "2", "--origin"))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"

    assert "withdrew lines version 2 and 1 of its parts; version 1 is in use" in await release(
        fleet, "withdraw", "lines", "2", "--reason", "labels swapped"
    )
    assert "owner-ada has 2 new keys, 2 must sign; 1 old ones removed" in await release(
        fleet, "rotate-key", "owner-ada", "--keys", "2", "--threshold", "2"
    )
    said = await release(fleet, "publish", str(tmp_path / "v3"), "--owner", "bob", "--serve", fails=True)
    assert "model lines belongs to ada, not to bob" in said
    await release(fleet, "publish", str(tmp_path / "v3"), "--owner", "ada", "--serve")
    assert np.allclose(await answer(fleet), X @ third, atol=1e-5)
    listed = await release(fleet, "list")
    assert "lines" in listed and "in use" in listed


async def test_a_release_is_signed_by_a_key_that_never_lies_on_the_gateway(fleet: LocalFleet, tmp_path: Path) -> None:
    key, file, folder = tmp_path / "ada.key", tmp_path / "change.json", tmp_path / "v4"
    fourth = write_model(folder, 4)
    await command("new-key", str(key))
    words = ("rotate-key", "owner-ada", "--public-key", f"{key}.pub")
    assert "--to-sign FILE writes what they must sign" in await release(fleet, *words, fails=True)
    await release(fleet, *words, "--to-sign", str(file))
    await command("sign", str(file), "--key", str(key), "--yes")
    assert "accepted owner-ada, targets; 2 keys sign no more" in await release(fleet, "accept", str(file))
    words = ("publish", str(folder), "--owner", "ada", "--serve")
    assert "role owner-ada needs 1 signatures, 0 of its keys are in" in await release(fleet, *words, fails=True)
    assert "then publish" in await release(fleet, *words, "--to-sign", str(file))
    await command("sign", str(file), "--key", str(key), "--yes")
    await release(fleet, "accept", str(file))
    assert "published lines version 4" in await release(fleet, *words)
    assert np.allclose(await answer(fleet), X @ fourth, atol=1e-5)
    assert "nothing waits" in await release(fleet, "unsigned", "--to-sign", str(file))


async def test_expired_metadata_block_updates_and_never_inference(fleet: LocalFleet, tmp_path: Path) -> None:
    """The gateway's repository is frozen; a board's updater says so, its agent answers, and goes on once it is renewed."""
    settings = load_settings(state=fleet.state)
    repository = open_repository(settings)
    repository._clock = lambda: time.time() - LIFE_S["timestamp"] - 60
    repository.change(lambda roles: roles.changed.add("timestamp"))
    state = fleet.folder("board-1")
    version = load_model(write_and_find(tmp_path / "v4", 4))
    wanted = Wanted(b"r" * 16, "lines", 4, (bytes.fromhex(version.experts[0].sha256),), "https", "")
    write_wanted(state, wanted)
    limits = {"file_bytes": 1 << 20, "memory_mb": 256, "assurance": "final"}
    write_durably(state / FOLDER / "limits.json", json.dumps(limits).encode())
    said = await updated(state, wanted)
    assert said.state == "failed" and "metadata: the repository's metadata is out of date" in said.reason
    (state / "experts" / f"{version.experts[0].sha256}.onnx").unlink(missing_ok=True)
    weights = linear(4)[1]
    assert np.allclose(await answer(fleet), X @ weights, atol=1e-5), "an expert is fetched and answers all the same"
    repository._clock = time.time
    assert repository.refresh() == (["timestamp"], {})
    assert (await updated(state, wanted)).state == "installed"
    record = read_record(state, "lines")
    assert record is not None and record.current.version == 4


def write_and_find(folder: Path, version: int) -> Path:
    write_model(folder, version)
    return folder


async def updated(state: Path, wanted: Wanted) -> Result:
    """What the updater over HTTPS, as an agent starts it, says of one try."""
    code = "import edge_agent.update_https as u, sys; u.TRIES = 1; sys.exit(u.main(['--state', sys.argv[1]]))"
    argv = [sys.executable, "-c", code, str(state)]
    await asyncio.to_thread(lambda: subprocess.run(argv, capture_output=True, text=True, timeout=100))
    found = read_result(state, wanted)
    assert found is not None
    return found


async def test_a_board_gets_a_receipt_that_it_verifies_and_nothing_of_what_is_withdrawn(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    identity = load_identity(fleet.folder("board-1"))
    client = FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key))

    class Source:
        def read(self, path: str, limit: int) -> bytes:
            return client.get(f"/v1/repository/{path}", limit)

        def stream(self, path, offset, limit):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    write_model(tmp_path / "v3", 3)
    model = load_model(tmp_path / "v3")
    trust = StateLayout(fleet.state).load_trust()
    digest = manifest_digest((tmp_path / "v3" / "model.json").read_bytes())
    releases = await asyncio.to_thread(lambda: check_entered(Source(), Word(trust), model, digest))
    assert set(releases) == {model.experts[0].sha256}
    write_model(tmp_path / "v2", 2)
    gone = load_model(tmp_path / "v2").experts[0].sha256
    for path in (f"/v1/blobs/{gone}", f"/v1/releases/{gone}", f"/v1/repository/{release_receipt_path(gone)}"):
        with pytest.raises(BmoeError, match="is withdrawn"):
            await asyncio.to_thread(lambda path=path: client.get(path))
    for path in ("metadata/../trust.json", "blobs/zz", "keys", model_receipt_path("lines", 99)):
        with pytest.raises((BmoeError, InputError)):
            await asyncio.to_thread(lambda path=path: client.get(f"/v1/repository/{path}"))
    root = json.loads(await asyncio.to_thread(lambda: client.get("/v1/repository/metadata/1.root.json")))
    assert root["signed"]["_type"] == "root"


async def test_a_rollout_over_https_outlives_its_coordinator_and_a_board_that_was_away_catches_up(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    weights = {v: write_model(tmp_path / f"v{v}", v, "slopes") for v in (11, 12)}
    await release(fleet, "publish", str(tmp_path / "v11"), "--owner", "bob")
    await release(fleet, "publish", str(tmp_path / "v12"), "--owner", "bob")
    await fleet.running["board-2"].stop(5)
    async with Load(fleet, "slopes", weights) as load:
        said = await rollout(fleet, "start", "slopes", "--canary", "label:lap", fails=True)
        assert "no agent in service meets 'label:lap'; of label there are: local" in said
        plan = ("--canary", "name:board-1", "--soak", "1", "--limit", "disagreement=1")
        await rollout(fleet, "start", "slopes", *plan, *NOISY)
        await until(fleet, "slopes", lambda row: row.get("holds") == ["board-1"])
        assert load.seen <= {11} and not load.failures, "no client is answered by a canary"
        (pid,) = [pid for pid, kind in fleet.members().items() if kind == "coordinator"]
        os.kill(pid, signal.SIGKILL)
        row = await until(fleet, "slopes", lambda row: row["stage"] == "done")
        assert (row["in_use"], row["reason"]) == (12, "1 of 2 agents hold it")
        failures = len(load.failures)
        await until(fleet, "slopes", lambda row: 12 in load.seen)
    assert load.seen == {11, 12}, "a wrong answer, or votes of two versions mixed"
    assert len(load.failures) == failures
    assert "1/2" in await rollout(fleet, "status", "slopes")
    await fleet.restart("board-2")
    await until(fleet, "slopes", lambda row: row["holds"] == ["board-1", "board-2"])
    record = read_record(fleet.folder("board-2"), "slopes")
    assert record is not None and record.current.version == 12
    assert "carrier=https" in fleet.log("board-2").read_text()


async def test_bad_versions_go_back_and_cost_no_client_an_answer(fleet: LocalFleet, tmp_path: Path) -> None:
    write_model(tmp_path / "v13", 13, "slopes")
    write_model(tmp_path / "v14", 14, "slopes", columns=5)
    async with Load(fleet, "slopes", {12: linear(12)[1]}) as load:
        await release(fleet, "publish", str(tmp_path / "v13"), "--owner", "bob")
        said = await rollout(fleet, "start", "slopes", *NOISY, "--follow", fails=True)
        assert "slopes 13 is rolled-back: canary: disagreement" in said
        await release(fleet, "publish", str(tmp_path / "v14"), "--owner", "bob")
        await rollout(fleet, "start", "slopes", "--soak", "0", *NOISY, "--limit", "tasks=0")
        row = await until(fleet, "slopes", lambda row: row["version"] == 14 and row["stage"] == "rolled-back")
    assert row["reason"].split(": ")[1] in ("failures", "disagreement"), "clients' requests are none for it"
    assert load.seen == {12} and not load.failures
    said = await rollout(fleet, "status", "slopes")
    assert "slopes 13 rolled-back: canary: disagreement" in said and "slopes 14 rolled-back: " in said
