"""What the journal holds of a request, as bytes: the request itself, its outcome, and entries promised but not entered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.protocol.encoding import bstr, decode, encode, read_bstrs
from bmoe.protocol.errors import MessageError
from bmoe.protocol.messages import MAX_TENSORS, tensor_specs, tensors_from
from bmoe.protocol.tensors import Tensor
from coordinator.jobs import Answered, Request, Result, ServedModel

ATTACHMENTS_MAX = 4096
# A model as it was when the request came; raises InputError when the ledger does not know that version.
Models = Callable[[str, int], ServedModel]


@dataclass(frozen=True)
class Submission:
    """An entry on its way to the ledger: its own fields and its attachments, the large ones by digest alone."""

    fields: dict[str, Any]
    attachments: tuple[bytes, ...]
    elsewhere: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, fields: dict[str, Any], attachments: Sequence[bytes], digest: Callable[[bytes], bytes]) -> Submission:
        """What is above 64 KiB is in the evidence store already, by the rule for every entry."""
        small = tuple(a for a in attachments if len(a) <= INLINE_BYTES)
        return cls(fields, small, tuple(digest(a) for a in attachments if len(a) > INLINE_BYTES))

    def to_bytes(self) -> bytes:
        """One byte string for the head, one for each attachment."""
        head = encode([[part for pair in self.fields.items() for part in pair], list(self.elsewhere)])
        return bstr(head) + b"".join(map(bstr, self.attachments))

    @classmethod
    def from_bytes(cls, data: bytes) -> Submission:
        """The same again."""
        head, *attachments = read_bstrs(data, 0, ATTACHMENTS_MAX)
        flat, elsewhere = decode(head, 1024 * 1024)
        return cls(dict(zip(flat[::2], flat[1::2], strict=True)), tuple(attachments), elsewhere)


def pack_request(request: Request) -> bytes:
    """A request with all that it takes to run it again, but for its model's files."""
    return _pack(_head(request), request.tensors, [])


def unpack_request(data: bytes, models: Models) -> Request:
    """The request again; raises InputError when its model is gone."""
    head, parts = _unpack(data)
    request, (specs,) = _request(head, models)
    return request(tensors_from(specs, parts))


def pack_answered(answered: Answered) -> bytes:
    """What a client was told, or is to be told, without its inputs."""
    result = answered.result
    head = [*_head(answered.request), answered.stage, list(answered.tasks)]
    return _pack(head, result.tensors, [answered.promise, result.salt, result.root, result.request_root])


def unpack_answered(data: bytes, models: Models) -> Answered:
    """The answer again, over a request without inputs; raises InputError when its model is gone."""
    head, parts = _unpack(data)
    request, (stage, tasks, specs) = _request(head, models)
    promise, salt, root, request_root, *data_parts = parts
    bare = request(())
    result = Result(tensors_from(specs, data_parts), salt, root, request_root, bare.salt)
    return Answered(bare, result, tasks, stage, promise)


def _head(request: Request) -> list[Any]:
    r = request
    return [
        r.id, r.tenant, r.model.name, r.model.statement.version, r.rows, r.policy, r.wait, r.client_id, r.received_ms,
        list(r.outputs), r.salt, r.reply_to,
    ]  # fmt: skip


def _request(head: tuple[Any, ...], models: Models) -> tuple[Callable[[tuple[Tensor, ...]], Request], tuple[Any, ...]]:
    identity, tenant, name, version, rows, policy, wait, client_id, received_ms, outputs, salt, reply_to, *rest = head
    model = models(name, version)

    def build(tensors: tuple[Tensor, ...]) -> Request:
        return Request(
            identity, tenant, model, tensors, rows, policy, wait, client_id, received_ms, outputs, salt, reply_to
        )

    return build, tuple(rest)


def _pack(head: list[Any], tensors: Sequence[Tensor], parts: Sequence[bytes]) -> bytes:
    specs = [[name, dtype, list(dims)] for name, dtype, dims in tensor_specs(tensors)]
    return b"".join(map(bstr, [encode([*head, specs]), *parts, *(t.data for t in tensors)]))


def _unpack(data: bytes) -> tuple[tuple[Any, ...], tuple[bytes, ...]]:
    parts = read_bstrs(data, 0, MAX_TENSORS + 8)
    if not parts:
        raise MessageError("an empty record in the journal")
    return decode(parts[0]), parts[1:]
