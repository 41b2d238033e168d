"""MQTT topics: one folder a device, so that a broker can let each device speak only as itself.

Letters, digits, '-', '_' and '/' only: '.' and spaces break on NATS. Down (to the device): task, notice, reply, update.
Up (from the device): output, refusal, status (retained), health, complaint, installed; and request/MODEL, one level
deeper.
"""

from __future__ import annotations

from bmoe.protocol.errors import MessageError
from bmoe.protocol.schema import is_name

ROOT = "bmoe/v1"
DOWN = ("task", "notice", "reply", "update")
UP = ("output", "refusal", "status", "health", "complaint", "installed")
REQUEST = "request"
EVERY_REQUEST = f"{ROOT}/+/{REQUEST}/+"


def topic(device: str, channel: str) -> str:
    """The topic of one channel of one device."""
    return f"{ROOT}/{device}/{channel}"


def every_device(channel: str) -> str:
    """The subscription for one channel of every device."""
    return f"{ROOT}/+/{channel}"


def parse_topic(value: str) -> tuple[str, str]:
    """(device, channel) of a topic; raises MessageError for any other shape."""
    parts = value.split("/")
    if len(parts) != 4 or "/".join(parts[:2]) != ROOT or not is_name(parts[2]) or parts[3] not in (*DOWN, *UP):
        raise MessageError(f"topic {value[:120]!a} is not {ROOT}/DEVICE/CHANNEL")
    return parts[2], parts[3]


def request_topic(device: str, model: str) -> str:
    """The topic on which a device asks a model."""
    return f"{ROOT}/{device}/{REQUEST}/{model}"


def is_request(value: str) -> bool:
    """Whether a topic has the shape of a request's: `parse_request` then says whose, and of which model."""
    parts = value.split("/", 4)
    return len(parts) == 5 and parts[3] == REQUEST


def parse_request(value: str) -> tuple[str, str]:
    """(device, model) of a request's topic; raises MessageError for any other shape."""
    parts = value.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT or parts[3] != REQUEST or not all(map(is_name, parts[2::2])):
        raise MessageError(f"topic {value[:120]!a} is not {ROOT}/DEVICE/{REQUEST}/MODEL")
    return parts[2], parts[4]
