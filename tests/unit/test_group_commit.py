"""Group commit: whoever waits hears how it went, whatever is wrong with what was to be written."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bmoe.protocol.errors import UnavailableError
from bmoe.storage.group_commit import GroupCommit

INSERT = "INSERT INTO number VALUES (?)"


@pytest_asyncio.fixture
async def file(tmp_path: Path) -> AsyncIterator[GroupCommit]:
    file = GroupCommit(tmp_path / "numbers.db", "CREATE TABLE number (n INTEGER UNIQUE);", 1, lambda db: None)
    yield file
    await file.close()


async def numbers(file: GroupCommit) -> list[int]:
    return await file.read(lambda db: [n for (n,) in db.execute("SELECT n FROM number ORDER BY n")])


@pytest.mark.parametrize("value", [1 << 63, object(), 1], ids=["beyond 64 bits", "no value at all", "twice the same"])
async def test_a_value_that_no_file_can_hold_fails_its_own_write_alone(file: GroupCommit, value: object) -> None:
    """Python's own errors once ended the writer: all who shared the transaction waited for ever."""
    await file.write((INSERT, [(1,)]))
    writes = [file.write((INSERT, [(2,)])), file.write((INSERT, [(value,)])), file.write((INSERT, [(3,)]))]
    done = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 5)
    assert [type(one) for one in done] == [type(None), UnavailableError, type(None)]
    assert "numbers.db takes nothing" in str(done[1])
    await file.write((INSERT, [(4,)]))
    assert await numbers(file) == [1, 2, 3, 4]


async def test_what_nobody_waits_for_and_cannot_be_written_is_named_and_holds_up_nothing(
    file: GroupCommit, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_lazily((INSERT, [(1,)]))
    file.write_lazily((INSERT, [(1 << 63,)]))
    with caplog.at_level(logging.ERROR, "bmoe.storage"):
        await asyncio.wait_for(file.write((INSERT, [(2,)])), 5)
    assert await numbers(file) == [1, 2] and "too large" in caplog.text
    await asyncio.wait_for(file.write((INSERT, [(3,)])), 5)


async def test_a_fault_in_tidying_is_told_to_all_who_wait(tmp_path: Path) -> None:
    faults = [ZeroDivisionError(), ZeroDivisionError(), ZeroDivisionError()]

    def tidy(db: sqlite3.Connection) -> None:
        if faults:
            raise faults.pop()

    file = GroupCommit(tmp_path / "numbers.db", "CREATE TABLE number (n INTEGER);", 1, tidy)
    writes = [file.write((INSERT, [(n,)])) for n in (1, 2)]
    done = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 5)
    assert all(isinstance(one, UnavailableError) and "ZeroDivisionError" in str(one) for one in done)
    await file.write((INSERT, [(3,)]))
    assert await numbers(file) == [3]
    await file.close()
