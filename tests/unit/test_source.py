"""A board's source and its gateway: asked, away, answered locally, verified later; and nothing that was kept is lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_helpers import Experts, Gateway, inputs, model, verified

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import ConfigError, InputError, MessageError, UnavailableError
from bmoe.protocol.tensors import Tensor
from edge_agent import source as source_module
from edge_agent.local import Local, differs
from edge_agent.oip import arrays_of, fitted, infer_body, local_reply, outputs_of
from edge_agent.requester import _judged
from edge_agent.source import Ask, Asker, Outcome, Question
from edge_agent.source_hook import Answer, HookSource, load_function
from edge_agent.submissions import Submission, Submissions

ONE = np.array([[1.0, 2.0]], np.float32)


class Models:
    def __init__(self, found: ReleasedModel) -> None:
        self.found = found

    async def get(self, name: str) -> ReleasedModel:
        return self.found


class Board:
    """An asker with its parts, and a source that asks what the test gives it."""

    def __init__(self, folder: Path, *, local: bool = True, count: int = 10) -> None:
        self.model = model()
        self.experts, self.gateway = Experts(self.model), Gateway(ONE)
        self.queue = Submissions(folder / "submissions.db", count=count, size=1 << 20)
        self.outcomes: list[Outcome] = []
        self.told_of, self.ready = asyncio.Event(), asyncio.Event()
        own = Local(self.experts, self.experts) if local else None  # type: ignore[arg-type]
        self.asker = Asker("m", Models(self.model), self.gateway, self.queue, own, {"wait": "final"}, 0.05)  # type: ignore[arg-type]
        self._ask: Ask

    async def run(self, model: ReleasedModel, ask: Ask) -> None:
        self.ready.set()
        await asyncio.Event().wait()

    async def told(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.told_of.set()

    async def __aenter__(self) -> Board:
        self.task = asyncio.ensure_future(self.asker.run(self))
        await asyncio.wait_for(self.ready.wait(), 5)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.queue.close()

    async def ask(self, identity: str = "q") -> dict[str, Any]:
        return await asyncio.wait_for(self.asker.ask(Question(identity, {"x": ONE}, f"ref-{identity}")), 5)

    async def outcome(self) -> Outcome:
        await asyncio.wait_for(self.told_of.wait(), 5)
        return self.outcomes[-1]

    async def true(self) -> np.ndarray:
        own = Local(self.experts, self.experts)  # type: ignore[arg-type]
        await own.hold(self.model)
        return arrays_of(await own.answer(self.model, inputs(ONE, self.model)))["y"]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(source_module, "RETRY_MAX_S", 0.02)


async def test_the_gateways_answer_is_the_answer(tmp_path: Path) -> None:
    async with Board(tmp_path) as board:
        assert (await board.ask())["parameters"]["assurance"] == "verified"
        assert board.experts.runs == 0 and len(board.queue) == 0


async def test_without_link_the_board_answers_by_itself_and_is_told_later_that_it_was_right(tmp_path: Path) -> None:
    async with Board(tmp_path) as board:
        board.gateway.up.clear()
        board.gateway.answer = await board.true()
        reply = await board.ask()
        assert (reply["parameters"]["assurance"], reply["parameters"]["submitted"]) == ("unverified", True)
        assert np.array_equal(arrays_of(outputs_of(reply))["y"], board.gateway.answer)
        board.gateway.up.set()
        outcome = await board.outcome()
        assert (outcome.id, outcome.reference, outcome.differs) == ("q", "ref-q", False)
        assert outcome.reply["parameters"]["assurance"] == "verified" and board.gateway.asked == ["q"]


async def test_a_local_answer_that_was_wrong_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Board(tmp_path) as board:
        board.gateway.up.clear()
        board.gateway.answer = await board.true() + 1
        await board.ask()
        board.gateway.up.set()
        assert (await board.outcome()).differs
    assert "local_answer_wrong" in caplog.text


async def test_a_gateway_that_says_try_again_counts_as_away_once_the_time_is_over(tmp_path: Path) -> None:
    async with Board(tmp_path) as board:
        board.gateway.error = UnavailableError("no verdict (503)")
        assert (await board.ask())["parameters"]["assurance"] == "unverified"
        assert len(board.gateway.asked) > 1, "it was tried again within the time"


async def test_a_submission_that_is_refused_is_told_and_does_not_hold_up_the_next(tmp_path: Path) -> None:
    async with Board(tmp_path) as board:
        board.gateway.up.clear()
        await board.ask()
        board.gateway.error = InputError("model 'm' is not served here (404)")
        board.gateway.up.set()
        outcome = await board.outcome()
        assert "not served" in outcome.reply["error"] and not outcome.differs
        with pytest.raises(InputError, match="not served"):
            await board.ask("next")


async def test_kept_submissions_outlive_the_process_and_a_full_queue_is_admitted(tmp_path: Path) -> None:
    async with Board(tmp_path, count=2) as board:
        board.gateway.up.clear()
        submitted = [(await board.ask(f"q{i}"))["parameters"]["submitted"] for i in range(3)]
        assert submitted == [True, True, False], "the third is answered too, and says that it will not be verified"
    async with Board(tmp_path) as board:  # what a killed process left
        board.gateway.answer = await board.true()
        while len(board.outcomes) < 2:
            board.told_of.clear()
            await board.outcome()
        assert {(o.id, o.reference) for o in board.outcomes} == {("q0", "ref-q0"), ("q1", "ref-q1")}


async def test_without_local_answers_a_request_waits_for_the_gateway(tmp_path: Path) -> None:
    async with Board(tmp_path, local=False) as board:
        board.gateway.up.clear()
        asking = asyncio.ensure_future(board.ask())
        done, _ = await asyncio.wait({asking}, timeout=0.1)
        assert not done
        board.gateway.up.set()
        assert (await asking)["parameters"]["assurance"] == "verified"


async def test_a_board_that_lacks_an_expert_does_not_guess(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.experts.missing = {board.model.experts[1].digest}
    async with board:
        board.gateway.up.clear()
        asking = asyncio.ensure_future(board.ask())
        done, _ = await asyncio.wait({asking}, timeout=0.1)
        assert not done and board.experts.runs == 0
        board.gateway.up.set()
        assert (await asking)["parameters"]["assurance"] == "verified"


# The queue.


async def test_the_queue_keeps_counts_and_forgets(tmp_path: Path) -> None:
    def one(identity: str, size: int = 10) -> Submission:
        return Submission(identity, "m", f"ref-{identity}", b"x" * size, {"id": identity})

    queue = Submissions(tmp_path / "q.db", count=3, size=1000)
    assert await queue.keep(one("a")) and await queue.keep(one("b")) and await queue.keep(one("b", 20))
    assert not await queue.keep(one("c", 2000)) and queue.waiting() == ["a", "b"]
    await queue.close()
    queue = Submissions(tmp_path / "q.db", count=3, size=1000)
    assert queue.waiting() == ["a", "b"] and await queue.get("b") == one("b", 20)
    await queue.drop("a")
    await queue.drop("a")
    assert await queue.keep(one("a", 900)) and not await queue.keep(one("d", 100))
    await queue.close()


async def test_what_is_dropped_twice_or_while_it_is_read_or_kept_again_ends_nothing(tmp_path: Path) -> None:
    """A source that asks again while its earlier question is being verified once ended by it."""

    def one(size: int) -> Submission:
        return Submission("a", "m", "ref", b"x" * size, {})

    queue = Submissions(tmp_path / "q.db", count=3, size=1000)
    await queue.keep(one(10))
    *_, found = await asyncio.gather(queue.drop("a"), queue.drop("a"), queue.get("a"))
    assert found is None and queue.waiting() == [] and await queue.get("never kept") is None
    await asyncio.gather(queue.keep(one(10)), queue.drop("a"), queue.keep(one(900)))
    assert queue.waiting() == ["a"] and await queue.get("a") == one(900)
    assert await queue.keep(one(990)), "only what is kept is counted"
    await queue.close()


async def test_a_question_answered_while_its_earlier_copy_is_being_verified_ends_no_source(tmp_path: Path) -> None:
    async with Board(tmp_path) as board:
        board.gateway.up.clear()
        got, get = asyncio.Event(), board.queue.get

        async def slowly(identity: str) -> Submission | None:
            await board.queue.drop(identity)  # as `ask` does once the gateway has answered
            try:
                return await get(identity)
            finally:
                got.set()

        board.queue.get = slowly  # type: ignore[method-assign]
        await board.ask("twice")
        await asyncio.wait_for(got.wait(), 5)
        board.gateway.up.set()
        board.queue.get = get  # type: ignore[method-assign]
        await board.ask("next")
        assert not board.task.done() and board.queue.waiting() == []


async def test_a_damaged_queue_is_put_aside_and_one_of_another_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    path.write_bytes(b"no database, but some bytes" * 100)
    queue = Submissions(path, count=3, size=1000)
    assert queue.waiting() == [] and list(tmp_path.glob("q.damaged-*"))
    await queue.close()
    import sqlite3

    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 9")
    db.commit()
    db.close()
    with pytest.raises(ConfigError, match="schema 9"):
        Submissions(path, count=3, size=1000)


# A local answer.


@pytest.mark.parametrize("shape", [{}, {"gate": False, "experts": 1, "top_k": 1}, {"top_k": 3}])
async def test_a_local_answer_is_the_weighted_sum_that_the_gateway_makes(shape: dict[str, Any]) -> None:
    found = model(**shape)
    experts = Experts(found)
    local = Local(experts, experts)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="does not hold"):
        await local.answer(found, inputs(ONE, found))
    await local.hold(found)
    rows = np.array([[1, 2], [-3, 4], [0.5, 0.25], [8, 9]], np.float32)
    said = arrays_of(await local.answer(found, inputs(rows, found)))["y"]
    for row, given in zip(said, rows, strict=True):
        scores = (np.arange(1, 4) * (1 + abs(given[0]))) % 5 if found.gate else np.ones(1)
        best = np.argsort(-scores, kind="stable")[: found.statement.top_k]
        weights = scores[best] / scores[best].sum()
        assert np.allclose(row, sum(w * given * (b + 1) for w, b in zip(weights, best, strict=True)))


def test_an_answer_differs_beyond_what_two_honest_boards_can() -> None:
    found = model()

    def tensor(value: float, name: str = "y", width: int = 2) -> list[Tensor]:
        return [Tensor(name, "float32", (1, width), np.full((1, width), value, "<f4").tobytes())]

    assert not differs(found, tensor(1.0), tensor(1.0019)) and differs(found, tensor(1.0), tensor(1.0021))
    assert differs(found, tensor(1.0), tensor(1.0, width=3)) and differs(found, tensor(1.0), tensor(1.0, "z"))


# Arrays and JSON.


@pytest.mark.parametrize(
    ("given", "spec", "expected"),
    [
        ([1, 2], ("x", "float32", (0, 2)), ((1, 2), np.float32([1, 2]))),
        (np.float64([[1, 2]]), ("x", "float32", (0, 2)), ((1, 2), np.float32([1, 2]))),
        (np.int64([[7, 8]]), ("x", "int32", (0, 2)), ((1, 2), np.int32([7, 8]))),
        ([[True, False]], ("x", "bool", (0, 2)), ((1, 2), np.bool_([True, False]))),
    ],
)
def test_arrays_are_fitted_without_being_changed(given: Any, spec: Any, expected: Any) -> None:
    [tensor] = fitted({"x": given}, [spec], True)
    assert (tensor.dims, tensor.data) == (expected[0], expected[1].tobytes())


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({"x": [1, 2, 3]}, ("x", "float32", (0, 2))),
        ({"x": [[1.5, 2]]}, ("x", "int32", (0, 2))),
        ({"x": [[300, 2]]}, ("x", "uint8", (0, 2))),
        ({"x": [[-1, 2]]}, ("x", "uint64", (0, 2))),
        ({"x": [["1", "2"]]}, ("x", "float32", (0, 2))),
        ({"x": [[1], [2, 3]]}, ("x", "float32", (0, 2))),
        ({"x": [[1, float("nan")]]}, ("x", "float32", (0, 2))),
        ({"x": [[1e39, 1]]}, ("x", "float32", (0, 2))),
        ({"x": [[True, False]]}, ("x", "float32", (0, 2))),
        ({"x": np.zeros((0, 2), np.float32)}, ("x", "float32", (0, 2))),
        ({"x": None}, ("x", "float32", (0, 2))),
        ({"y": [[1, 2]]}, ("x", "float32", (0, 2))),
        ({"inputs": [1]}, ("x", "float32", (0, 2))),
        ({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1]}]}, ("x", "float32", (0, 2))),
        ({"inputs": [{"name": "x", "shape": "12", "datatype": "FP32", "data": [1, 2]}]}, ("x", "float32", (0, 2))),
        ({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP8", "data": [1, 2]}]}, ("x", "float32", (0, 2))),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, spec: Any) -> None:
    with pytest.raises(MessageError):
        fitted(given, [spec], True)


def test_a_body_reads_back_as_the_inputs_that_it_asks_about() -> None:
    found = model()
    tensors = inputs([[1, 2], [3, 4]], found)
    body = json.loads(infer_body(tensors, "q", {"wait": "final"}))
    assert (body["id"], body["parameters"]) == ("q", {"wait": "final"})
    assert fitted(body, found.inputs, found.batch) == tensors
    assert outputs_of(local_reply("m", 1, "q", tensors)) == tensors


@pytest.mark.parametrize("reply", [{}, {"outputs": [], "parameters": 1}, {"outputs": {}, "parameters": {}}])
def test_a_reply_that_is_none_is_not_believed(reply: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="neither outputs nor an error"):
        _judged(reply)


# A function as a source.


def hook(requests: list[Any], heard: list[Answer]) -> HookSource:
    def readings() -> Any:
        for request in requests:
            heard.append((yield request))

    return HookSource(readings)


async def test_a_generator_is_sent_the_answer_to_what_it_yielded() -> None:
    heard: list[Answer] = []
    asked: list[Question] = []

    async def ask(question: Question) -> dict[str, Any]:
        asked.append(question)
        if isinstance(question.inputs["x"], str):
            raise InputError("x is bad")
        return verified(question.id, ONE)

    await hook([{"x": ONE}, {"x": "bad"}, "nothing"], heard).run(model(), ask)
    assert [a.error for a in heard] == ["", "x is bad", "a request is a dict of arrays or an infer body, found str"]
    assert heard[0].assurance == "verified" and np.array_equal(heard[0].outputs["y"], ONE)
    assert heard[0].id == asked[0].id != asked[1].id


async def test_a_function_that_fails_is_named_and_ends_the_source(tmp_path: Path) -> None:
    def readings() -> Any:
        yield {"x": ONE}
        raise OSError("the sensor is gone")

    board = Board(tmp_path)
    with pytest.raises(Exception, match="the source failed: OSError: the sensor is gone"):
        await asyncio.wait_for(board.asker.run(HookSource(readings)), 5)
    await board.queue.close()


async def test_a_source_that_ends_waits_until_its_last_local_answer_is_verified(tmp_path: Path) -> None:
    later: list[Answer] = []

    def readings() -> Any:
        answer = yield {"x": ONE}
        assert answer.assurance == "unverified"
        board.gateway.answer = answer.outputs["y"] + 5
        loop.call_soon_threadsafe(board.gateway.up.set)

    board, loop = Board(tmp_path), asyncio.get_running_loop()
    board.gateway.up.clear()
    await asyncio.wait_for(board.asker.run(HookSource(readings, later.append)), 5)
    assert [(a.assurance, a.differs) for a in later] == [("verified", True)] and len(board.queue) == 0
    await board.queue.close()


@pytest.mark.parametrize("named", ["", "json", "json:", ":dumps", "json:nothing", "no_such_module:f", "json:__name__"])
def test_a_function_that_is_none_is_refused(named: str) -> None:
    with pytest.raises(ConfigError):
        load_function(named)


def test_a_function_must_yield() -> None:
    with pytest.raises(ConfigError, match="must yield requests"):
        HookSource(json.dumps)
