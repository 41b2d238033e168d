"""What comes up from agents: every message is parsed, bound to its topic, and verified before anything believes it."""

from __future__ import annotations

from bmoe.ledger.rules.entries import MAX_LEAF_BYTES, MAX_OUTPUTS
from bmoe.ledger.rules.outputs import Binding, candidate_of, open_output, parse_output
from bmoe.ledger.rules.state import State
from bmoe.protocol.encoding import bstr
from bmoe.protocol.errors import BmoeError, MessageError, RefusedError
from bmoe.protocol.messages import MAX_TENSORS, Header, Output, Release, Sealed, open_message
from bmoe.protocol.topics import parse_topic
from coordinator.collect import Received

MAX_UP_BYTES = 8 * 1024 * 1024
# An output's envelope without its tensors' descriptions; a tensor's dims, at most 5 bytes each, and its CBOR heads.
FIXED_BYTES = 480
DIM_BYTES = 6
# In a verdict's leaf: everything but its outputs, and for each output its opening's digest and its agent's name.
REST_OF_VERDICT = 1024
NAMES_BYTES = 112


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


def output_bytes_max(release: Release) -> int:
    """How large an honest signed output for this release can be: a verdict must hold all of its outputs in one leaf."""
    return FIXED_BYTES + sum(len(o[0].encode()) + len(o[1]) + DIM_BYTES * (len(o[2]) + 1) for o in release.outputs)


def outputs_max(release: Release) -> int:
    """How many outputs of this release a verdict can hold beside its referee's."""
    return max(1, min(MAX_OUTPUTS, (MAX_LEAF_BYTES - REST_OF_VERDICT) // (output_bytes_max(release) + NAMES_BYTES) - 1))


def receive_output(sealed: Sealed[Output], binding: Binding, release: Release) -> Received:
    """An output bound to its task and opened; its `candidate` is None when the value may not count."""
    parse_output(sealed.raw, binding)
    header = sealed.header
    limit = output_bytes_max(release)
    if len(sealed.raw) > limit:
        raise RefusedError(
            f"{header.author}'s signed output has {len(sealed.raw)} bytes, an honest one at most {limit}"
        )
    opening = b"".join(bstr(p) for p in sealed.parts)
    tensors = open_output(header, opening)
    return Received(
        header.author, sealed.raw, opening, header.output_root, tensors, candidate_of(header, tensors, release)
    )
