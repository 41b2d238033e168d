"""A watched folder: each file one request and one answer, whatever is dropped, whenever the process dies."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import by_path
from source_helpers import model, verified

from bmoe.protocol.errors import ConfigError, InputError, MessageError
from edge_agent.oip import fitted
from edge_agent.source import Outcome, Question
from edge_agent.source_files import SUFFIXES, read_inputs
from edge_agent.source_folder import FolderSource

ONE = np.array([[1.0, 2.0]], np.float32)
EXAMPLES = Path(__file__).resolve().parents[2] / "firmware_configs" / "examples"


class Inbox:
    """A folder under watch, and a gateway that answers or, while `away`, never does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.away = folder, False
        self.asked: list[Question] = []
        self.source = FolderSource(folder, poll_s=0.01, file_bytes=10_000)

    async def ask(self, question: Question) -> dict[str, Any]:
        self.asked.append(question)
        if self.away:
            await asyncio.Event().wait()
        found = model()
        fitted(question.inputs, found.inputs, found.batch)
        return verified(question.id, ONE)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.source.run(model(), self.ask))
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Poll: a file that appears tells by no event."""
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never: {sorted(p.name for p in self.folder.rglob('*'))}")

    def drop(self, name: str, data: bytes) -> None:
        (self.folder / f".{name}.part").write_bytes(data)
        (self.folder / f".{name}.part").rename(self.folder / name)

    def answer(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{name}.answer.json").read_bytes()))

    async def done(self, name: str) -> dict[str, Any]:
        await self.until((self.folder / "done" / name).exists)
        return self.answer(name)


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / "inbox")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


BODY = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}], "parameters": {"wait": "final"}}
GOOD = {
    "a.npy": npy(ONE), "b.npz": npz(x=ONE), "c.json": json.dumps(BODY).encode(), "d.json": b'{"x": [[1, 2]]}',
    "e.csv": b"1,2\n3,4\n", "F.NPY": npy([1.0, 2.0]),
}  # fmt: skip


async def test_each_file_is_asked_once_answered_beside_and_moved(inbox: Inbox) -> None:
    async with inbox.watched():
        for name, data in GOOD.items():
            inbox.drop(name, data)
        for name, data in GOOD.items():
            assert (await inbox.done(name))["parameters"]["assurance"] == "verified"
            assert (inbox.folder / "done" / name).read_bytes() == data
    assert sorted(q.reference for q in inbox.asked) == sorted(GOOD)
    assert not [p for p in inbox.folder.iterdir() if p.is_file() and not p.name.endswith(".answer.json")]


async def test_a_bad_file_is_answered_with_the_reason_and_holds_up_nobody(inbox: Inbox) -> None:
    async with inbox.watched():
        inbox.drop("a.npy", b"no array")
        inbox.drop("b.csv", b"1;2")
        inbox.drop("c.npy", npy(np.zeros((1, 3), np.float32)))
        inbox.drop("d.npy", b"x" * 20_000)
        inbox.drop("e.npy", npy(ONE))
        await inbox.done("e.npy")
        for name, reason in (("a.npy", "cannot be read"), ("b.csv", "cannot be read"), ("c.npy", "expected 'x'")):
            assert reason in inbox.answer(name)["error"]
        assert "at most 10000" in inbox.answer("d.npy")["error"]


async def test_a_file_that_cannot_be_read_is_told_like_any_other(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "a.npy" and path.parent.name == "work":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refusing)  # for one who runs as root may read everything
    async with inbox.watched():
        inbox.drop("a.npy", npy(ONE))
        inbox.drop("b.npy", npy(ONE))
        assert (await inbox.done("a.npy"))["error"] == "a.npy cannot be read: Permission denied"
        await inbox.done("b.npy")


async def test_what_is_no_request_is_left_alone(inbox: Inbox) -> None:
    async with inbox.watched():
        inbox.drop("notes.txt", b"hello")
        (inbox.folder / "folder.npy").mkdir()
        (inbox.folder / "link.npy").symlink_to("/etc/passwd")
        (inbox.folder / ".hidden.npy").write_bytes(npy(ONE))
        inbox.drop("a.npy", npy(ONE))
        await inbox.done("a.npy")
    assert len(inbox.asked) == 1


async def test_a_file_that_still_grows_is_waited_for(inbox: Inbox) -> None:
    data = npy(ONE)
    for size in range(1, len(data), 30):
        (inbox.folder / "slow.npy").write_bytes(data[:size])
        assert inbox.source._settled() == []
    (inbox.folder / "slow.npy").write_bytes(data)
    assert inbox.source._settled() == [] and inbox.source._settled() == ["slow.npy"]


async def test_a_kill_while_a_file_is_in_work_asks_again_under_the_same_id(inbox: Inbox) -> None:
    inbox.away = True
    async with inbox.watched():
        inbox.drop("a.npy", npy(ONE))
        await inbox.until(lambda: len(inbox.asked) == 1)
    assert (inbox.folder / "work" / "a.npy").exists()
    inbox.away = False
    async with inbox.watched():  # another process, on what the first left
        await inbox.done("a.npy")
    assert inbox.asked[0].id == inbox.asked[1].id and len(inbox.asked) == 2


async def test_a_kill_between_answer_and_move_asks_nothing_again(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    inbox.drop("a.npy", npy(ONE))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inbox.source, "_finish", killed)
        await inbox.source._serve(inbox.source._claim("a.npy"), model(), inbox.ask)
    assert (inbox.folder / "work" / "a.npy").exists() and inbox.answer("a.npy")
    async with inbox.watched():
        await inbox.done("a.npy")
    assert len(inbox.asked) == 1


async def test_a_name_used_again_is_a_new_request_and_no_file_is_lost(inbox: Inbox) -> None:
    async with inbox.watched():
        inbox.drop("a.npy", npy(ONE))
        first = await inbox.done("a.npy")
        inbox.drop("a.npy", npy(ONE))
        await inbox.until(lambda: len(list((inbox.folder / "done").iterdir())) == 2)
    assert len(inbox.asked) == 2 and inbox.answer("a.npy")["id"] != first["id"]


async def test_what_is_verified_later_is_written_beside(inbox: Inbox) -> None:
    await inbox.source.told(Outcome("q", "a.npy", verified("q", ONE), True))
    later = json.loads((inbox.folder / "a.npy.verified.json").read_bytes())
    assert later["differs"] is True and later["parameters"]["assurance"] == "verified"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be watched"):
        FolderSource(tmp_path / "file" / "inbox", poll_s=1, file_bytes=1)


# Files.


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_unpacked() -> None:
    bomb = npz(x=np.zeros(1_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(MessageError, match="unpacks to"):
        read_inputs("a.npz", bomb, model(), 10_000)


def test_no_pickle_is_ever_loaded() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MessageError, match="cannot be read"):
        read_inputs("a.npy", file.getvalue(), model(), 10_000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("x.npy", file.getvalue())
    with pytest.raises(MessageError, match="cannot be read"):
        read_inputs("a.npz", archive.getvalue(), model(), 10_000)


def test_a_file_without_names_needs_a_model_of_one_input() -> None:
    two = model(inputs=(("x", "float32", (0, 2)), ("z", "float32", (0, 2))))
    for name, data in (("a.npy", npy(ONE)), ("a.csv", b"1,2")):
        with pytest.raises(MessageError, match=r"use \.npz or \.json"):
            read_inputs(name, data, two, 10_000)


def test_rows_of_numbers_take_the_shape_of_the_input() -> None:
    images = model(inputs=(("x", "int64", (0, 2, 3)),))
    [tensor] = fitted(read_inputs("a.csv", b"1,2,3,4,5,6\n7,8,9,10,11,12", images, 99), images.inputs, True)
    assert tensor.dims == (2, 2, 3) and np.frombuffer(tensor.data, "<i8").tolist() == list(range(1, 13))


@given(st.sampled_from(SUFFIXES), st.binary(max_size=200) | st.sampled_from(list(GOOD.values())))
@settings(max_examples=150, deadline=None)
def test_no_bytes_do_worse_than_be_refused(suffix: str, data: bytes) -> None:
    found = model()
    try:
        fitted(read_inputs(f"a{suffix}", data, found, 10_000), found.inputs, found.batch)
    except InputError as error:
        assert len(str(error)) < 600


# The example for a serial line.


def test_the_serial_example_makes_windows_of_what_a_sensor_sends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = by_path(EXAMPLES / "serial_sensor.py")
    sensor, line = pty.openpty()
    monkeypatch.setenv("SENSOR_PORT", os.ttyname(line))
    source = example.readings()
    written = "".join(f"{i},{i},{i},{i},{i},{i}\nnoise\n1,2\n" for i in range(100)).encode()
    port = example.open_port(os.ttyname(line))  # set up before the sensor speaks, or the line would echo
    os.close(port)
    os.write(sensor, written)
    request = next(source)
    assert request["window"].shape == (1, 6, 100) and request["window"].dtype == np.float32
    assert request["window"][0, 3].tolist() == list(range(100))
    os.close(sensor)
    os.close(line)

    class Answer:
        id, error, assurance, outputs = "q", "", "verified", {"probabilities": np.eye(7)[[4]]}

    with pytest.raises(StopIteration):
        source.send(Answer())
    assert capsys.readouterr().out == "q class 4, verified\n"
