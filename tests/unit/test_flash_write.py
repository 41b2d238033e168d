"""Writing: the first block last, everything read back, and what is left when it is broken off at any point."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from flash_helpers import flashed
from image_maker import make_image

from bmoe.protocol.errors import ImageError, RefusedError
from coordinator.boards import load_board
from coordinator.flash import flash as flashing
from coordinator.flash import write
from coordinator.flash.plan import inspect
from coordinator.flash.spool import Spool


def test_the_first_block_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a card whose writing was cut off boots nowhere, rather than half."""
    made, order = make_image(tmp_path / "system.img"), []
    real = write._write_at
    monkeypatch.setattr(write, "_write_at", lambda handle, data, at: (order.append(at), real(handle, data, at)))
    flashed(monkeypatch, made.path, tmp_path / "card.img")
    assert order[-1] == 0 and 0 not in order[:-1] and min(order[:-1]) >= write.HELD_BYTES


def test_a_card_whose_writing_is_broken_off_boots_nothing_old_and_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file in a card's place, full of an older system."""
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card"
    card.write_bytes(b"\xaa" * (11 << 20))
    board = load_board("rpi5")

    def pulled_out(done: int, total: int) -> None:
        raise KeyboardInterrupt

    handle = os.open(card, os.O_RDWR)
    with Spool() as spool:
        source, found = inspect(made.path, board, spool, None, lambda done, total: None)
        with pytest.raises(KeyboardInterrupt):
            write.write_image(handle, source, found, [], False, {"write": pulled_out, "verify": pulled_out})
    os.close(handle)
    content = card.read_bytes()
    assert content[: 1 << 20] == bytes(1 << 20) and content[-1:] == b"\xaa"


def test_a_card_that_is_killed_at_any_write_boots_nothing_or_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file in a card's place: whatever the last write was, the first block is empty, or everything is there."""
    made, card, board = make_image(tmp_path / "system.img"), tmp_path / "card", load_board("rpi5")
    patches = [(made.boot[0] + 8192, b"first" * 100), (made.boot[0] + 65536, b"second" * 100)]
    silent: dict[str, Any] = {phase: lambda done, total: None for phase in ("write", "verify")}
    real, log = write._write_at, []
    monkeypatch.setattr(write, "_sync", lambda handle: log.append("sync"))

    class Killed(BaseException): ...

    def until(last: int) -> bytes:
        """The card after its last-th write; all of it for 0."""
        log.clear()

        def counted(handle: int, data: bytes, offset: int) -> None:
            real(handle, data, offset)
            log.append(offset)
            if len([entry for entry in log if entry != "sync"]) == last:
                raise Killed

        monkeypatch.setattr(write, "_write_at", counted)
        card.write_bytes(b"\xaa" * (11 << 20))
        handle = os.open(card, os.O_RDWR)
        with Spool() as spool, contextlib.suppress(Killed):
            source, found = inspect(made.path, board, spool, None, silent["write"])
            write.write_image(handle, source, found, patches, False, silent)
        os.close(handle)
        return card.read_bytes()

    whole, writes = until(0), list(log)
    # Wiped and synced; the image, synced; the changes, synced; and the first block alone.
    ends = [index for index, entry in enumerate(writes) if entry == "sync"]
    assert writes[:2] == [0, "sync"] and len(ends) == 4
    assert writes[ends[1] + 1 :] == [*(offset for offset, _ in patches), "sync", 0, "sync"]
    for last in range(1, len(writes) - len(ends) + 1):
        content = until(last)
        assert content[: 1 << 20] == bytes(1 << 20) if last < len(writes) - len(ends) else content == whole


def test_a_full_disk_under_the_output_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (9 << 20, before[1])
    )  # the kernel's own refusal of a file that is too large
    try:
        with pytest.raises(RefusedError, match=r"the target refused byte \d+: File too large"):
            flashed(monkeypatch, made.path, card)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not card.exists()


def test_a_target_that_lies_about_what_it_keeps_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    real = write._sync

    def worn(handle: int) -> None:
        os.pwrite(handle, b"\x5a", made.root[0] + 5000)
        real(handle)

    monkeypatch.setattr(write, "_sync", worn)
    with pytest.raises(RefusedError, match="does not give back what was written"):
        flashed(monkeypatch, made.path, card)
    assert not card.exists(), "nobody shall take it for a card"


@pytest.mark.parametrize(("last", "at"), [(2, 4 << 20), (3, 0), (3, 510)])
def test_what_was_written_last_is_read_back_too(
    last: int, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed sectors are synced second, the first block third: a card may lose these alone."""
    made, card, real, syncs = make_image(tmp_path / "system.img"), tmp_path / "card.img", write._sync, []

    def worn(handle: int) -> None:
        syncs.append(handle)
        if len(syncs) == last:
            changed = next(offset for offset, _ in patches if offset >= at) if at else 0
            os.pwrite(handle, b"\x5a", changed if last == 2 else at)
        real(handle)

    patches: list[Any] = []
    whole = flashing.write_image
    monkeypatch.setattr(write, "_sync", worn)
    monkeypatch.setattr(flashing, "write_image", lambda *given: (patches.extend(given[3]), whole(*given))[1])
    with pytest.raises(RefusedError, match="does not give back byte"):
        flashed(monkeypatch, made.path, card)
    assert not card.exists()


def test_an_image_that_changes_while_it_is_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, card = make_image(tmp_path / "system.img"), tmp_path / "card.img"
    real = write._stream

    def meanwhile(*arguments: Any) -> Any:
        with made.path.open("r+b") as file:
            file.seek(made.root[0] + 3)
            file.write(b"!")
        return real(*arguments)

    monkeypatch.setattr(write, "_stream", meanwhile)
    with pytest.raises(ImageError, match="changed while it was written"):
        flashed(monkeypatch, made.path, card)
    assert not card.exists()
