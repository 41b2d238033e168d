"""Hostile bytes for the shared contract: encoding, envelope, messages, tensors, topics, the runner's frames, join tokens."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from random import Random

import make
from mutate import spoil_cbor, spoil_message
from target import MEGABYTE, Target

from bmoe.inference import framing, runner
from bmoe.protocol.encoding import bstr, decode, encode, read_bstrs
from bmoe.protocol.envelope import parse_envelope
from bmoe.protocol.errors import EncodingError, EnvelopeError, InferenceError, InputError, MessageError
from bmoe.protocol.join_token import PREFIX, JoinToken, parse_token
from bmoe.protocol.messages import MAX_TENSORS, MESSAGES, Task, open_message, tensors_from
from bmoe.protocol.tensors import row_bytes
from bmoe.protocol.topics import is_request, parse_request, parse_topic, request_topic, topic

TOKEN = JoinToken("https://192.168.1.10:8443", b"t" * 8, b"s" * 16, b"p" * 32)


@functools.cache
def golden(prefix: str) -> tuple[bytes, ...]:
    """The golden files whose names begin so."""
    return tuple(data for name, data in sorted(make.files().items()) if name.startswith(prefix))


def _cbor(data: bytes) -> bytes:
    return encode(decode(data))


def _strings(data: bytes) -> bytes:
    return b"".join(map(bstr, read_bstrs(data, 0, 64)))


def _envelope(data: bytes) -> bytes:
    return parse_envelope(data).encode()


def _message(data: bytes) -> bytes:
    """As the type that it says it is of, else as every one."""
    failed: InputError = MessageError("no type takes it")
    for cls in MESSAGES.values():
        try:
            sealed = open_message(cls, data, parts_max=MAX_TENSORS + 1)
        except InputError as error:
            failed = error
            continue
        assert sealed.header.to_bytes() == sealed.envelope.payload
        return sealed.message()
    raise failed


def _task(data: bytes) -> None:
    sealed = open_message(Task, data, parts_max=MAX_TENSORS + 1)
    tensors = tensors_from(sealed.header.inputs, sealed.parts[1:])
    if tensors and all(t.dims and t.dims[0] for t in tensors):
        row_bytes(tensors, 0)


def _topic(data: bytes) -> bytes:
    text = data.decode(errors="surrogateescape")
    made = request_topic(*parse_request(text)) if is_request(text) else topic(*parse_topic(text))
    return made.encode()


class _Replay(asyncio.StreamReader):
    """A stream that holds what a worker said, and no more."""

    def __init__(self, data: bytes) -> None:
        super().__init__(loop=_loop())
        self.feed_data(data)
        self.feed_eof()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _worker(data: bytes) -> None:
    """What a worker replies: whatever it is, the runner knows it as broken."""
    try:
        kind, parts = _loop().run_until_complete(runner._read_frame(_Replay(data), 1 << 16))
        runner._result(kind, parts)
    except runner.BROKEN as error:
        raise InferenceError(str(error) or type(error).__name__) from error


def _worker_seeds() -> Sequence[bytes]:
    head = framing.tensor_head("y", "float32", (2, 3))
    parts = [framing.DURATION.pack(5), b"CPUExecutionProvider", head, bytes(24)]
    return [b"".join(framing.encode(framing.DONE, parts)), b"".join(framing.encode(framing.READY, [b"1.32"]))]


def _token(data: bytes) -> None:
    token = parse_token(data.decode(errors="surrogateescape"))
    assert parse_token(token.text()) == token


def _vary_token(random: Random, data: bytes) -> bytes:
    import base64

    raw = spoil_cbor(random, encode([TOKEN.url, TOKEN.token, TOKEN.secret, TOKEN.pin]))
    return PREFIX.encode() + base64.urlsafe_b64encode(raw).rstrip(b"=")


TARGETS = (
    Target("cbor", _cbor, lambda: [encode((1, b"two", "drei", {0: True, 23: (-4,)})), *golden("entry")],
           (EncodingError,), vary=spoil_cbor),
    Target("byte-strings", _strings, lambda: [b"".join(map(bstr, (b"", b"a" * 23, b"b" * 300, b"c" * 70_000)))],
           (EncodingError,)),
    Target("envelope", _envelope, lambda: golden("message-m"), (EnvelopeError,)),
    Target("message", _message, lambda: golden("message"), (EncodingError, EnvelopeError, MessageError),
           vary=spoil_message),
    Target("task", _task, lambda: golden("message-task"), (EncodingError, EnvelopeError, MessageError),
           vary=spoil_message),
    Target("topic", _topic, lambda: [b"bmoe/v1/pi-1/output", b"bmoe/v1/pi-1/request/wearable",
                                     b"bmoe/v1/pi-1/update", b"bmoe/v1/pi-1/installed"], (MessageError,)),
    Target("worker-reply", _worker, _worker_seeds, (InferenceError,), memory=MEGABYTE),
    Target("join-token", _token, lambda: [TOKEN.text().encode()], (MessageError,), vary=_vary_token),
)  # fmt: skip
