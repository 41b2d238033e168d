"""Fetching experts from the real fleet server: resumed, shared, bounded, and never believed without proof."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from agent_gateway import FleetServer
from agent_helpers import Gateway

from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.protocol.tls import mutual_tls
from edge_agent.experts import Experts, TooLargeError
from edge_agent.fleet import FleetClient
from edge_agent.join import join

MODEL = os.urandom(100_000)


@dataclasses.dataclass
class Bench:
    """A board that has joined, and the gateway that it fetches from."""

    server: FleetServer
    gateway: Gateway
    folder: Path
    fleet: FleetClient
    open: Callable[..., Experts]

    def release(self, model: bytes, **change: Any) -> bytes:
        digest = self.server.publish(model)
        self.server.releases[digest] = self.gateway.release(model, ledger=self.server.ledger.ledger, **change)
        return digest

    def fetched(self) -> list[str]:
        return [r.split("/")[2] for r in self.server.requests if r.startswith(("GET /v1/blobs", "GET /v1/releases"))]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with FleetServer(tmp_path / "gateway").running() as server:
        identity = await asyncio.to_thread(
            join, tmp_path / "board", server.token(), name="pi-1", gateway=None, force=False
        )
        fleet = FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key), 5)
        made: list[Experts] = []

        def make(file_bytes: int = 1 << 20, cache_bytes: int = 1 << 22) -> Experts:
            made.append(
                Experts(
                    tmp_path / "experts", fleet, identity.registrar, identity.ledger, file_bytes=file_bytes,
                    cache_bytes=cache_bytes,
                )
            )  # fmt: skip
            return made[-1]

        yield Bench(server, Gateway(registrar=server.registrar), tmp_path / "experts", fleet, make)
        for experts in made:
            await experts.close()


async def test_an_expert_is_fetched_once_whoever_asks_and_found_again_after_a_restart(bench: Bench) -> None:
    digest = bench.release(MODEL)
    experts = bench.open()
    served = await asyncio.gather(*(experts.get(digest) for _ in range(20)))
    assert all(s is served[0] for s in served)
    assert served[0].file.path.read_bytes() == MODEL and served[0].release.expert_name == "mlp"
    assert bench.fetched() == ["releases", "blobs"]
    await bench.open().get(digest)
    assert bench.fetched() == ["releases", "blobs"], "nothing is fetched twice"


async def test_a_broken_download_is_resumed_where_it_broke(bench: Bench) -> None:
    digest = bench.release(MODEL)
    bench.folder.mkdir()
    (bench.folder / f"{digest.hex()}.part").write_bytes(MODEL[:70_000])
    asked: list[int] = []
    original = bench.fleet.fetch

    def watched(path: str, offset: int, max_bytes: int, sink: Any) -> None:
        asked.append(offset)
        original(path, offset, max_bytes, sink)

    bench.fleet.fetch = watched  # type: ignore[method-assign]
    assert (await bench.open().get(digest)).file.path.read_bytes() == MODEL
    assert asked == [70_000]
    assert not list(bench.folder.glob("*.part"))


async def test_a_damaged_part_is_thrown_away_and_the_next_try_is_clean(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.experts.RETRY_S", 0)
    digest = bench.release(MODEL)
    bench.folder.mkdir()
    (bench.folder / f"{digest.hex()}.part").write_bytes(bytes(70_000))
    experts = bench.open()
    with pytest.raises(InputError, match="should have SHA-256"):
        await experts.get(digest)
    assert not list(bench.folder.glob("*.part")) and not list(bench.folder.glob("*.onnx"))
    assert (await experts.get(digest)).file.path.read_bytes() == MODEL


async def test_a_server_that_sends_too_little_or_too_much_is_not_believed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.experts.RETRY_S", 0)
    digest = bench.release(MODEL)
    blob = bench.server.blobs / digest.hex()
    experts = bench.open()
    blob.write_bytes(MODEL[:50_000])
    with pytest.raises(UnavailableError, match="50000 of 100000"):
        await experts.get(digest)
    blob.write_bytes(MODEL + b"more")
    with pytest.raises(InputError, match="more than the 100000"):
        await experts.get(digest)
    blob.write_bytes(MODEL)
    assert (await experts.get(digest)).file.path.read_bytes() == MODEL


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"signer": Signer.generate()}, InputError),
        ({"digest": bytes(32)}, RefusedError),
        ({"ledger": bytes(16)}, RefusedError),
        ({"size": 2 << 20}, TooLargeError),
        ({"size": 0}, TooLargeError),
    ],
)
async def test_a_release_that_the_registrar_did_not_sign_for_this_is_refused_before_any_download(
    bench: Bench, change: dict[str, Any], error: type[BmoeError]
) -> None:
    digest = bench.server.publish(MODEL)
    bench.server.releases[digest] = bench.gateway.release(MODEL, **{"ledger": bench.server.ledger.ledger, **change})
    with pytest.raises(error):
        await bench.open().get(digest)
    assert bench.fetched() == ["releases"]


async def test_an_unknown_expert_is_asked_for_once_and_not_at_every_task(bench: Bench) -> None:
    experts = bench.open()
    for _ in range(10):
        with pytest.raises(RefusedError, match="404"):
            await experts.get(bytes(32))
    assert bench.fetched() == ["releases"]


async def test_the_longest_unused_goes_when_the_disk_share_is_full(bench: Bench) -> None:
    models = [os.urandom(40_000) for _ in range(4)]
    digests = [bench.release(model) for model in models]
    experts = bench.open(cache_bytes=100_000)
    for age, digest in zip((300, 200), digests[:2], strict=True):
        path = (await experts.get(digest)).file.path
        os.utime(path, (time.time() - age, time.time() - age))
    await experts.get(digests[2])
    left = {path.stem for path in bench.folder.glob("*.onnx")}
    assert left == {digests[1].hex(), digests[2].hex()}
    await experts.get(digests[0])
    assert len(list(bench.folder.glob("*.onnx"))) == 2, "fetched again, in place of another"


async def test_what_updates_brought_past_the_bound_goes_and_a_strangers_file_stays(bench: Bench) -> None:
    digest = bench.release(MODEL)
    experts = bench.open(cache_bytes=150_000)
    path = (await experts.get(digest)).file.path
    os.utime(path, (1, 1))
    brought = bench.folder / f"{'b' * 64}.onnx"
    brought.write_bytes(bytes(100_000))
    (bench.folder / "notes.onnx").write_bytes(b"a user's own")
    await experts.trim()
    assert not path.exists() and brought.exists() and (bench.folder / "notes.onnx").exists()
    assert (await experts.get(digest)).file.path.read_bytes() == MODEL, "fetched again for the next task"


async def test_an_expert_that_an_update_dropped_to_make_room_is_fetched_again(bench: Bench) -> None:
    digest = bench.release(MODEL)
    experts = bench.open()
    (await experts.get(digest)).file.path.unlink()
    assert (await experts.get(digest)).file.path.read_bytes() == MODEL


async def test_a_file_damaged_on_disk_is_fetched_again_once_forgotten(bench: Bench) -> None:
    digest = bench.release(MODEL)
    experts = bench.open()
    path = (await experts.get(digest)).file.path
    path.write_bytes(bytes(len(MODEL)))
    experts.forget(digest)
    assert (await experts.get(digest)).file.path.read_bytes() == MODEL
    path.write_bytes(b"short")
    assert (await bench.open().get(digest)).file.path.read_bytes() == MODEL, "of the wrong size: seen at once"
