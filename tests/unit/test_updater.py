"""The update core: a version installed, resumed, gone back from; and death, full disks and broken lines at every step."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from release_site import EPSILON, Site, golden_of, linear, parts_of

from bmoe.protocol.errors import UnavailableError
from bmoe.storage.download import parts_folder, progress
from bmoe.storage.installed import pinned, read_record
from bmoe.storage.manifest import Model, TensorSpec
from bmoe.storage.publication import bundle
from bmoe.storage.targets import blob_path, model_receipt_path, release_receipt_path
from bmoe.storage.update_source import Received
from bmoe.storage.updater import STEPS, Installed, Refused, Wanted, apply

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def site(installed: Site) -> Site:
    """A board with version 1 installed, and version 2 released."""
    installed.release(installed.model(2))
    installed.reads.clear()
    return installed


def test_a_version_is_installed_tested_and_the_one_before_kept(site: Site) -> None:
    assert site.update(2) == Installed("lines", 2, 1)
    assert site.installed() == 2 and site.tested == ["one", "one"]
    record = read_record(site.board, "lines")
    assert record is not None and record.previous is not None and record.previous.version == 1
    assert pinned(site.board) == {*record.current.parts, *record.previous.parts}
    assert not list((site.board / "updates" / "parts").iterdir())


def test_a_version_that_is_there_is_not_fetched_again(site: Site) -> None:
    site.update(2)
    blobs = {p: n for p, n in site.reads.items() if p.startswith("blobs/")}
    assert site.update(2) == Installed("lines", 2, 1, changed=False)
    parts = set(map(blob_path, pinned(site.board)))
    assert {p: n for p, n in site.reads.items() if p in parts} == {p: n for p, n in blobs.items() if p in parts}


def test_a_board_goes_back_to_the_version_before_without_fetching_its_expert_again(site: Site) -> None:
    site.update(2)
    site.reads.clear()
    assert site.update(1) == Installed("lines", 1, 2) and site.installed() == 1
    assert blob_path(parts_of(site.model(1))[0]) not in site.reads
    assert site.update(2) == Installed("lines", 2, 1) and site.installed() == 2


def test_the_same_core_takes_what_flower_brought(site: Site) -> None:
    made = bundle(site.repository, "lines", 2)
    (part,) = parts_of(site.model(2))
    receipts = (model_receipt_path("lines", 2), release_receipt_path(part))
    files = {**made.metadata, **{p: site.read(p, 1 << 20) for p in receipts}}
    files |= {blob_path(sha256): site.read(blob_path(sha256), 1 << 20) for sha256 in made.blobs}
    half = made.blobs[part] // 2
    first = files | {blob_path(part): files[blob_path(part)][:half]}
    board, test = site.board, lambda *_: None
    found = apply(Received(first), board, Wanted("lines", 2), site.trusted(), test)
    assert isinstance(found, Refused) and found.again and f"{half} of" in found.reason
    assert progress(board, made.blobs)[part] == half
    rest = files | {blob_path(part): files[blob_path(part)][half:]}
    source = Received(rest, {blob_path(part): half})
    assert apply(source, board, Wanted("lines", 2), site.trusted(), test) == Installed("lines", 2, 1)


def test_a_board_away_for_many_versions_and_three_changes_of_every_key_catches_up(site: Site) -> None:
    for version in range(3, 6):
        for role in ("root", "targets", "snapshot", "timestamp", "owner-ada"):
            site.repository.rotate(role, keys=2, threshold=2)
        site.release(site.model(version))
    assert site.update(5) == Installed("lines", 5, 1)


def test_a_board_offline_for_sixty_days_catches_up_and_goes_on_with_what_it_had(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata have expired meanwhile, three times over; the half of a file that had come is not fetched again."""
    days = [60.0]

    class Simulated(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
            return dt.datetime.fromtimestamp(time.time() - days[0] * 86_400, tz)

    now = SimpleNamespace(datetime=Simulated, timezone=dt.timezone)
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", now)
    site.repository._clock = lambda: time.time() - days[0] * 86_400
    site.repository.change(lambda roles: roles.changed.update(("targets", "owner-ada")))
    onnx, w = linear(3, padding=60_000)
    (part,) = parts_of(site.release(site.model(3, site.expert(onnx, golden_of(w)))))
    site.breaks_after = 40_000
    assert site.stays("the connection broke", version=3).again
    had = progress(site.board, {part: len(onnx)})[part]
    assert had > 30_000
    while days[0] > 0:
        days[0] -= 3
        site.repository.refresh()
    days[0], site.breaks_after = 0.0, 0
    site.reads.clear()
    assert site.update(3) == Installed("lines", 3, 1)
    assert site.reads[blob_path(part)] == len(onnx) - had


def test_another_update_waits_for_the_one_in_work(site: Site) -> None:
    told = []

    def second(step: str) -> None:
        if step == "self-test":
            told.append(site.update(2))

    assert site.update(2, second) == Installed("lines", 2, 1)
    (refused,) = told
    assert isinstance(refused, Refused) and refused.again and "another update is in work" in refused.reason


def large(site: Site, version: int = 2) -> Model:
    """A version of an expert that takes some time to fetch, and a gate."""
    onnx, w = linear(20, padding=60_000)
    scores, v = linear(21, outputs=1, name="scores")
    outputs = (TensorSpec("scores", "float32", (None, 1), EPSILON),)
    gate = site.expert(scores, golden_of(v, "scores"), "gate", outputs=outputs)
    return site.model(version, site.expert(onnx, golden_of(w), "large"), gate=gate)


DEATHS = [(step, 1) for step in STEPS] + [(step, 2) for step in ("download", "check", "self-test", "move")]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Version 1 installed, and a large version 2 released; boards are copied from this one's."""
    site = Site(tmp_path_factory.mktemp("released"))
    site.release(site.model(1))
    site.update(1)
    site.release(large(site))
    return site


@pytest.mark.parametrize(("step", "nth"), DEATHS)
def test_killed_at_any_step_a_board_has_the_old_version_or_the_new_and_then_goes_on(
    released: Site, tmp_path: Path, step: str, nth: int
) -> None:
    site = copy.copy(released)
    site.board = tmp_path / "board"
    shutil.copytree(released.board, site.board, symlinks=True)
    sizes = bundle(site.repository, "lines", 2).blobs
    _killed(site, 2, step, nth)
    assert site.installed() == (2 if step == "done" else 1)
    before = sum(progress(site.board, sizes).values())
    site.reads.clear()
    assert isinstance(site.update(2), Installed) and site.installed() == 2
    fetched = sum(n for path, n in site.reads.items() if path.removeprefix("blobs/") in sizes)
    assert step == "done" or fetched <= sum(sizes.values()) - before, "what had arrived was fetched again"


def _killed(site: Site, version: int, step: str, nth: int) -> None:
    """A child that updates, and dies by SIGKILL where it reaches a step for the nth time."""
    child = os.fork()
    if child == 0:
        seen: Counter[str] = Counter()

        def at(now: str) -> None:
            seen[now] += 1
            if (now, seen[now]) == (step, nth):
                os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            site.update(version, at)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, f"it never came to {step} {nth}"


def test_a_download_that_breaks_off_again_and_again_is_never_begun_anew(site: Site) -> None:
    model = site.release(large(site, 3))
    path, size = blob_path(parts_of(model)[0]), model.experts[0].bytes
    rounds = 0
    for limit in range(10_000, size + 10_000, 10_000):
        site.breaks_after = limit
        found = site.update(3)
        rounds += 1
        if isinstance(found, Installed):
            break
        assert found.again and found.step == "download" and "broke" in found.reason
    assert site.installed() == 3 and rounds > 4 and site.reads[path] == size


def test_a_disk_too_small_is_said_before_anything_is_fetched(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmoe.storage.download.SPARE_BYTES", 1 << 60)
    assert site.stays("the disk is full").again
    assert blob_path(parts_of(site.model(2))[0]) not in site.reads


def test_a_part_that_a_power_cut_spoiled_is_fetched_once_more(site: Site) -> None:
    """The file has its size, and zeros where the disk had not written yet."""
    (part,) = parts_of(site.model(2))
    whole = site.read(blob_path(part), 1 << 20)
    spoiled = parts_folder(site.board) / part
    spoiled.write_bytes(whole[:50] + bytes(len(whole) - 60))
    assert site.stays("bytes of it from an earlier try: fetched anew from the start").again
    assert site.update(2) == Installed("lines", 2, 1)
    assert not list(parts_folder(site.board).iterdir())


def test_a_source_that_tampers_with_the_rest_of_a_file_is_found_out_at_the_second_try(site: Site) -> None:
    (part,) = parts_of(site.model(2))
    whole = site.read(blob_path(part), 1 << 20)
    site.spoiled[blob_path(part)] = whole[:-1] + bytes([whole[-1] ^ 1])
    (parts_folder(site.board) / part).write_bytes(whole[:50])
    assert site.stays("fetched anew").again
    assert not site.stays("it was tampered with, or damaged").again


def test_an_expert_damaged_on_disk_is_fetched_again(site: Site) -> None:
    (part,) = parts_of(site.model(2))
    size = len(site.read(blob_path(part), 1 << 20))
    (site.board / "experts" / f"{part}.onnx").write_bytes(bytes(size))
    assert site.update(2) == Installed("lines", 2, 1) and site.installed() == 2


def test_experts_that_no_version_has_make_room_and_no_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for the one or the other: what the agent fetched for tasks goes, the longest unused first."""
    experts = site.board / "experts"
    old, new = (experts / f"{c * 64}.onnx" for c in "ab")
    for path, age in ((old, 500), (new, 100)):
        path.write_bytes(bytes(300))
        path.with_suffix(".release").write_bytes(b"")
        os.utime(path, (time.time() - age, time.time() - age))
    needed = sum(bundle(site.repository, "lines", 2).blobs.values())

    def room(left: int) -> None:
        free = lambda path: SimpleNamespace(free=left)  # noqa: E731
        monkeypatch.setattr("bmoe.storage.download.shutil", SimpleNamespace(disk_usage=free))
        monkeypatch.setattr("bmoe.storage.download.SPARE_BYTES", needed)

    room(10)
    assert site.stays("the disk is full").again
    assert old.exists() and new.exists(), "dropped, and for nothing"
    (part,) = parts_of(site.model(2))
    golden = site.model(2).experts[0].golden
    assert golden is not None
    size = len(site.read(blob_path(part), 1 << 20)) + golden.bytes + needed
    begun = sum(path.stat().st_size for path in parts_folder(site.board).iterdir())  # of the update refused above
    room(size - begun - 200)
    assert site.update(2) == Installed("lines", 2, 1)
    assert not old.exists() and not old.with_suffix(".release").exists() and new.exists()


def test_a_board_whose_own_record_is_damaged_is_no_fault_of_the_release(site: Site) -> None:
    (site.board / "updates" / "lines.json").write_bytes(b"{")
    found = site.update(2)
    assert isinstance(found, Refused) and found.again and "remove it and the model is installed anew" in found.reason
    assert pinned(site.board) == set()


def test_a_carrier_that_is_behind_is_no_fault_of_the_release(site: Site) -> None:
    """Flower's parcel was made before the metadata that this board has seen over HTTPS."""
    early = bundle(site.repository, "lines", 2).metadata
    site.release(site.model(1, name="other"))
    assert isinstance(site.update(1, name="other"), Installed)
    site.spoiled |= early
    assert site.stays("the repository went back to older metadata").again
    site.spoiled.clear()
    assert site.update(2) == Installed("lines", 2, 1)


def test_a_disk_that_fills_up_midway_keeps_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is really full: RLIMIT_FSIZE cannot tell ENOSPC, so this one is 256 KiB of tmpfs."""
    site = Site(tmp_path)
    site.release(site.model(1))
    onnx, w = linear(3, padding=400_000)
    site.release(site.model(2, site.expert(onnx, golden_of(w))))
    monkeypatch.setattr("bmoe.storage.download.SPARE_BYTES", -(1 << 30))  # something else fills it meanwhile
    with _small_disk(site.board):
        site.update(1)
        assert site.stays("the disk is full").again


@contextlib.contextmanager
def _small_disk(folder: Path):  # type: ignore[no-untyped-def]
    done = os.system(f"mount -t tmpfs -o size=256k tmpfs {folder} 2>/dev/null")
    if done:
        pytest.skip("no small file system here, for mounting it takes root")
    try:
        yield
    finally:
        os.system(f"umount --lazy {folder}")


def test_a_gateway_that_is_away_is_asked_again_later(site: Site) -> None:
    site.spoiled["metadata/timestamp.json"] = UnavailableError("https://gateway:8443: no route to host")
    assert site.stays("no route to host").again
    site.spoiled.clear()
    assert site.update(2) == Installed("lines", 2, 1)
