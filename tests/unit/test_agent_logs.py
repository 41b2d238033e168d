"""The agent's log in both forms: the same facts, one line each, whatever they hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from edge_agent.logs import event, set_up


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.Formatter.converter
    yield
    root.handlers[:], root.level, logging.Formatter.converter = before


def test_a_line_of_json_has_the_facts_and_one_of_text_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    line = event("task_refused", task=bytes(16), kind="expired", new=3, detail='a "b"\nc')
    assert line == f"event=task_refused task={'00' * 16} kind=expired new=3 detail=\"a 'b'\\nc\""
    set_up("info", "json")
    logging.getLogger("bmoe.agent").warning(line)
    logging.getLogger("bmoe.agent").warning("plain %s", "text")
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("bmoe.agent").exception(event("fault", where="here"))
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert {k: first[k] for k in ("event", "task", "kind", "new", "level")} == {
        "event": "task_refused", "task": "00" * 16, "kind": "expired", "new": 3, "level": "warning",
    }  # fmt: skip
    assert first["detail"] == 'a "b"\nc' and first["timestamp"].endswith("Z")
    assert second["event"] == "plain text" and "ValueError: x" in third["exception"]
