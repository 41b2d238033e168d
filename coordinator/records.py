"""What the journal holds of a request, as bytes: the request itself, its outcome, and entries promised but not entered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.encoding import bstr, decode, encode, read_bstrs
from bmoe.protocol.errors import MessageError
from bmoe.protocol.messages import MAX_TENSORS, tensor_specs, tensors_from
from bmoe.protocol.schema import is_tensor_spec, is_uint
from bmoe.protocol.tensors import Tensor
from coordinator.jobs import Answered, Request, Result

ATTACHMENTS_MAX = 4096
# A model as it was when the request came; raises InputError when the ledger does not know that version.
Models = Callable[[str, int], ReleasedModel]
# A value's check, and what an error says was expected.
Field = tuple[Callable[[Any], bool], str]


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
        """The same again; raises InputError for bytes that are damaged."""
        head, *attachments = _strings(data, ATTACHMENTS_MAX)
        values = decode(head, 1024 * 1024)
        flat, elsewhere = _fitting(values, ((_is_pairs, "named fields"), (_is_blobs, "digests")))
        return cls(dict(zip(flat[::2], flat[1::2], strict=True)), tuple(attachments), elsewhere)


def pack_request(request: Request) -> bytes:
    """A request with all that it takes to run it again, but for its model's files."""
    return _pack(_head(request), request.tensors, [])


def unpack_request(data: bytes, models: Models) -> Request:
    """The request again; raises InputError when its model is gone."""
    head, parts = _unpack(data)
    request, (specs,) = _request(head, (_SPECS,), models)
    return request(tensors_from(specs, parts))


def pack_answered(answered: Answered) -> bytes:
    """What a client was told, or is to be told, without its inputs."""
    result = answered.result
    head = [*_head(answered.request), answered.stage, list(answered.tasks)]
    return _pack(head, result.tensors, [answered.promise, result.salt, result.root, result.request_root])


def unpack_answered(data: bytes, models: Models) -> Answered:
    """The answer again, over a request without inputs; raises InputError when its model is gone."""
    head, parts = _unpack(data)
    request, (stage, tasks, specs) = _request(head, (_TEXT, (_is_tasks, "task ids"), _SPECS), models)
    if len(parts) < 4:
        raise MessageError(f"a record in the journal has {len(parts)} parts, an answer's 4 and its tensors")
    promise, salt, root, request_root, *data_parts = parts
    bare = request(())
    result = Result(tensors_from(specs, data_parts), salt, root, request_root, bare.salt)
    if not set(bare.outputs) <= {t.name for t in result.tensors}:
        raise MessageError(f"a record in the journal names the outputs {bare.outputs}, and holds others")
    return Answered(bare, result, tasks, stage, promise)


def _head(request: Request) -> list[Any]:
    r = request
    return [
        r.id, r.tenant, r.model.name, r.model.statement.version, r.rows, r.policy, r.wait, r.client_id, r.received_ms,
        list(r.outputs), r.salt, r.reply_to,
    ]  # fmt: skip


def _request(
    head: Any, behind: tuple[Field, ...], models: Models
) -> tuple[Callable[[tuple[Tensor, ...]], Request], tuple[Any, ...]]:
    values = _fitting(head, _HEAD + behind)
    identity, tenant, name, version, rows, policy, wait, client_id, received_ms, outputs, salt, reply_to, *rest = values
    model = models(name, version)

    def build(tensors: tuple[Tensor, ...]) -> Request:
        return Request(
            identity, tenant, model, tensors, rows, policy, wait, client_id, received_ms, outputs, salt, reply_to
        )

    return build, tuple(rest)


def _pack(head: list[Any], tensors: Sequence[Tensor], parts: Sequence[bytes]) -> bytes:
    specs = [[name, dtype, list(dims)] for name, dtype, dims in tensor_specs(tensors)]
    return b"".join(map(bstr, [encode([*head, specs]), *parts, *(t.data for t in tensors)]))


def _unpack(data: bytes) -> tuple[Any, tuple[bytes, ...]]:
    parts = _strings(data, MAX_TENSORS + 8)
    return decode(parts[0]), parts[1:]


def _strings(data: bytes, count_max: int) -> tuple[bytes, ...]:
    parts = read_bstrs(data, 0, count_max)
    if not parts:
        raise MessageError("an empty record in the journal")
    return parts


def _fitting(values: Any, fields: Sequence[Field]) -> tuple[Any, ...]:
    """The values, once they are known to be what was written: a disk may give back something else."""
    if type(values) is not tuple or len(values) != len(fields):
        raise MessageError(f"a record in the journal has no {len(fields)} fields: it is damaged")
    for value, (check, expected) in zip(values, fields, strict=True):
        if not check(value):
            raise MessageError(f"a record in the journal must have {expected}, found {short(value)}: it is damaged")
    return values


def _is_pairs(value: Any) -> bool:
    return type(value) is tuple and len(value) % 2 == 0 and all(type(name) is str for name in value[::2])


def _is_blobs(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is bytes for item in value)


def _is_tasks(value: Any) -> bool:
    return _is_blobs(value) and all(len(task) == 16 for task in value)


def _is_names(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is str for item in value)


_TEXT: Field = (lambda value: type(value) is str, "text")
_NUMBER: Field = (is_uint, "a number")
_ID: Field = (lambda value: type(value) is bytes and len(value) == 16, "16 bytes")
_SPECS: Field = (lambda value: type(value) is tuple and all(map(is_tensor_spec, value)), "[name, dtype, dims]")
# The order of `_head`.
_HEAD: tuple[Field, ...] = (
    _ID, _TEXT, _TEXT, _NUMBER, _NUMBER, _TEXT, _TEXT, _TEXT, _NUMBER, (_is_names, "names of outputs"), _ID, _TEXT,
)  # fmt: skip
