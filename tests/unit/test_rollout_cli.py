"""What `bmoe rollout` prints and refuses, over a client that answers from rows."""

from __future__ import annotations

from typing import Any

import pytest
import typer.testing

from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError, UnknownError
from coordinator.cli import rollout as cli
from coordinator.cli.tables import out, show

ROW: dict[str, Any] = {
    "rollout": "00", "model": "toy", "version": 2, "stage": "share", "reason": "", "wave": ["a", "b"], "at": 0, "in_use": 1,
    "stuck": "", "waits": "1 of 2 agents to install it", "agents": 4, "holds": ["a"], "share": 0.25, "tasks": 7,
    "tasks_needed": 20, "p95_ms": 3.0, "p95_ms_in_use": 2.0, "dissent": 1, "failed": 0, "rows": 7, "differing": 2,
    "lacks": {"b": "refused: self-test: [/red] differs"}, "troubles": {"c": "1 of 7 outputs dissent"},
}  # fmt: skip
ENDS = [
    {"model": "toy", "version": 1, "stage": "done", "reason": "4 of 4 agents hold it", "rollout": "01", "at": 0},
    {"model": "toy", "version": 9, "stage": "rolled-back", "reason": "canary: latency: slow", "rollout": "02", "at": 0},
]


class Client:
    """Answers with rows, each of which may be an error."""

    def __init__(self, *replies: list[dict[str, Any]] | BmoeError) -> None:
        self.replies, self.plans = list(replies), []

    def rollouts(self) -> list[dict[str, Any]]:
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, BmoeError):
            raise reply
        return reply

    def ended_rollouts(self) -> list[dict[str, Any]]:
        return ENDS

    def start_rollout(self, model: str, version: int | None, plan: dict[str, Any]) -> dict[str, Any]:
        self.plans.append(plan)
        return {"rollout": "00", "version": version or 2}


def said(monkeypatch: pytest.MonkeyPatch, client: Client, *words: str) -> str:
    """What a command prints; raises what it ends with."""
    monkeypatch.setattr(cli, "_client", lambda *_: client)
    monkeypatch.setattr(cli, "FOLLOW_S", 0.0)
    monkeypatch.setattr(out, "width", 240)
    with out.capture() as capture:
        done = typer.testing.CliRunner().invoke(cli.rollout_app, list(words), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return capture.get() + done.output


def test_status_has_the_bar_what_it_waits_for_who_lacks_it_and_why_others_went_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = said(monkeypatch, Client([ROW]), "status")
    for words in ("###......... 1/4", "waits for 1 of 2 agents to install it", "7 tasks, p95 3 ms (in use 2)"):
        assert words in text
    assert "toy 2: b: refused: self-test: [/red] differs" in text, "what a board says is no markup"
    assert "toy 2: c: 1 of 7 outputs dissent" in text
    assert "1970-01-01 00:00 UTC  toy 9 rolled-back: canary: latency: slow" in text and "toy 1 done" not in text


@pytest.mark.parametrize("reason", ["[/bold]", "[link=x", "\\[", "[red]"])
def test_no_word_of_a_board_ends_a_table(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    assert reason in said(monkeypatch, Client([{**ROW, "reason": reason}]), "status", "toy")
    with out.capture() as capture:
        show([{"agent": "a", "board": reason}])
    assert reason in capture.get()


def test_a_model_that_was_never_rolled_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownError, match="no version of tyo was ever rolled out"):
        said(monkeypatch, Client([ROW]), "status", "tyo")
    assert "no version of any model" in said(monkeypatch, Client([]), "status")


def test_following_outlives_a_gateway_that_restarts_and_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    away = UnavailableError("connection refused")
    back = {**ROW, "stage": "rolled-back", "reason": "share: dissent: 9 % of its outputs dissent"}
    with pytest.raises(RefusedError, match="toy 2 is rolled-back: share: dissent"):
        said(monkeypatch, Client([ROW], away, away, [back]), "status", "toy", "--follow")
    monkeypatch.setattr(cli, "AWAY_S", -1.0)
    with pytest.raises(UnavailableError):
        said(monkeypatch, Client([ROW], away), "status", "toy", "--follow")


def test_a_limit_that_is_none_is_refused_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client([ROW])
    for limit, words in (
        ("latancy=2", "one of tasks, minority, dissent"),
        ("tasks=1.5", "NAME=NUMBER"),
        ("dissent", "NAME"),
    ):
        with pytest.raises(InputError, match=words):
            said(monkeypatch, client, "start", "toy", "--limit", limit)
    assert client.plans == []
    said(monkeypatch, client, "start", "toy", "--canary", "2", "--canary", "label:lab", "--limit", "tasks=5")
    assert client.plans[0]["canary"] == ["label:lab"] and client.plans[0]["limits"] == {"tasks": 5}
