"""What comes up from agents: every message is parsed, bound to its topic, and verified before anything believes it."""

from __future__ import annotations

from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output
from bmoe.ledger.rules.state import State
from bmoe.protocol.encoding import bstr
from bmoe.protocol.errors import BmoeError, MessageError, RefusedError
from bmoe.protocol.messages import MAX_TENSORS, Header, Output, Release, Sealed, open_message
from bmoe.protocol.topics import parse_topic
from coordinator.collect import Received

MAX_UP_BYTES = 8 * 1024 * 1024


def open_from(state: State, topic: str, payload: bytes, cls: type[Header]) -> Sealed:
    """A message of a known kind, signed by the very agent whose topic it came on.

    Raises InputError for bytes that are no such message, RefusedError for one that speaks for somebody else.
    """
    device, _ = parse_topic(topic)
    if len(payload) > MAX_UP_BYTES:
        raise MessageError(f"{device} sent {len(payload)} bytes, at most {MAX_UP_BYTES} are taken")
    sealed = open_message(cls, payload, parts_max=MAX_TENSORS + 1 if cls is Output else 0)
    if sealed.header.author != device:
        raise RefusedError(f"{device} sent a {cls.CONTEXT} in the name of {sealed.header.author}")
    if (sealed.header.ledger, sealed.header.epoch) != (state.ledger, state.epoch):
        raise RefusedError(f"{device} sent a {cls.CONTEXT} for another ledger")
    sealed.verify(state.key_of(device))
    return sealed


def signed_by(state: State, device: str, payload: bytes, cls: type[Header]) -> bool:
    """Whether the device's own key signed a message of this kind, whatever it says: a refused one is evidence then."""
    try:
        open_message(cls, payload, parts_max=MAX_TENSORS + 1).verify(state.key_of(device))
    except BmoeError:
        return False
    return True


def receive_output(sealed: Sealed[Output], binding: Binding, release: Release) -> Received:
    """An output bound to its task and opened; its `candidate` is None when the value may not count."""
    parse_output(sealed.raw, binding)
    header = sealed.header
    opening = b"".join(bstr(p) for p in sealed.parts)
    tensors = open_output(header, opening)
    return Received(
        header.author, sealed.raw, opening, header.output_root, tensors, candidate_of(header, tensors, release)
    )
