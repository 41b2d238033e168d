"""Topics: one folder a device; whatever is not exactly one of ours is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import MessageError
from bmoe.protocol.topics import (
    DOWN,
    EVERY_REQUEST,
    UP,
    every_device,
    is_request,
    parse_request,
    parse_topic,
    request_topic,
    topic,
)


def test_topics_are_these() -> None:
    assert topic("agent-1", "task") == "bmoe/v1/agent-1/task"
    assert every_device("output") == "bmoe/v1/+/output"
    assert DOWN == ("task", "notice", "reply", "update")
    assert UP == ("output", "refusal", "status", "health", "complaint", "installed")


def test_a_request_names_its_device_and_its_model() -> None:
    assert request_topic("pi-1", "wearable") == "bmoe/v1/pi-1/request/wearable"
    assert EVERY_REQUEST == "bmoe/v1/+/request/+"
    assert parse_request(request_topic("pi-1", "wearable")) == ("pi-1", "wearable")
    assert is_request("bmoe/v1/pi-1/request/wearable") and not is_request("bmoe/v1/pi-1/request")


@pytest.mark.parametrize(
    "value",
    [
        *("", "bmoe/v1/pi-1/request", "bmoe/v1/pi-1/request/", "bmoe/v1/pi-1/request/a/b", "bmoe/v1//request/wearable"),
        *("bmoe/v1/pi-1/request/a.b", "bmoe/v1/pi-1/request/A", "bmoe/v2/pi-1/request/a", "bmoe/v1/pi-1/output/a"),
    ],
)
def test_any_other_topic_is_no_request(value: str) -> None:
    with pytest.raises(MessageError, match="is not bmoe/v1/DEVICE/request/MODEL"):
        parse_request(value)


@pytest.mark.parametrize("channel", [*DOWN, *UP])
def test_what_we_name_we_read(channel: str) -> None:
    assert parse_topic(topic("agent-1", channel)) == ("agent-1", channel)


WRONG = ["", "bmoe/v1", "bmoe/v1/agent-1", "bmoe/v1/agent-1/", "bmoe/v2/agent-1/task", "/bmoe/v1/agent-1/task"]
WRONG += ["bmoe/v1/agent-1/task/", "bmoe/v1/+/task", "bmoe/v1/#", "bmoe/v1/agent.1/task", "bmoe/v1/agent 1/task"]
WRONG += ["bmoe/v1/agent-1/order", "bmoe/v1//task", "bmoe/v1/a/b/task", "bmoe/v1/agent-1/task\n", "BMOE/v1/a/task"]


@pytest.mark.parametrize("value", WRONG)
def test_any_other_topic_is_refused(value: str) -> None:
    with pytest.raises(MessageError, match="is not bmoe/v1/DEVICE/CHANNEL"):
        parse_topic(value)


@given(st.text(max_size=80))
def test_no_text_does_worse_than_be_refused(value: str) -> None:
    with pytest.raises(MessageError):
        parse_topic(value)


def test_a_topic_of_a_megabyte_gives_a_short_error() -> None:
    with pytest.raises(MessageError) as caught:
        parse_topic("x" * 1_000_000)
    assert len(str(caught.value)) < 200
