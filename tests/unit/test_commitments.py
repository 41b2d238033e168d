"""Commitments: one row can be opened alone, proves itself, gives nothing else away, and belongs to its author."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import struct

import numpy as np
import pytest

from bmoe.ledger.rules.commitments import commit_rows, row_leaf
from bmoe.ledger.rules.merkle import leaf_hash, row_proof, verify_inclusion
from bmoe.ledger.rules.outputs import (
    Binding,
    candidate_of,
    check_specs,
    open_output,
    opening_of,
    parse_output,
    tolerances_of,
    unpack_dims,
)
from bmoe.ledger.rules.voting import distance
from bmoe.protocol.encoding import bstr, encode
from bmoe.protocol.errors import InputError, ManifestError, MessageError, ProofError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Output, Release, seal_header, tensor_specs
from bmoe.protocol.tensors import Tensor, row_bytes, row_salt

SALT = bytes(range(16))
ROWS = 5
A = Tensor("a", "float32", (ROWS, 2), np.arange(10, dtype="<f4").tobytes())
B = Tensor("b", "int8", (ROWS, 1), bytes(range(ROWS)))
SIGNER = Signer.from_bytes(bytes([4] * 32))


# What a row's leaf says of its tensors: name, dtype, and the dims of a row.
SHAPE = encode(tuple((t.name, t.dtype, t.dims[1:]) for t in (A, B)))


def _leaves(author: str = "agent-1", salt: bytes = SALT) -> list[bytes]:
    return [row_leaf(author, salt, [A, B], i, ROWS) for i in range(ROWS)]


@pytest.mark.parametrize("index", range(ROWS))
def test_one_row_opens_alone_with_its_own_salt(index: int) -> None:
    root = commit_rows("agent-1", SALT, [A, B], ROWS)
    # All that is handed over: the row's salt, its bytes and a path; not the batch's salt, and no other row.
    salt, row, path = row_salt(SALT, index), SHAPE + row_bytes([A, B], index), row_proof(_leaves(), index)
    leaf = leaf_hash(salt + b"agent-1\x00" + row)
    verify_inclusion(index, ROWS, leaf, path, root)
    for other in range(ROWS):
        if other != index:
            with pytest.raises(ProofError):
                verify_inclusion(other, ROWS, leaf, path, root)
    wrong = [leaf_hash(salt + b"agent-2\x00" + row), leaf_hash(salt + b"agent-1\x00" + row[:-1] + b"\xff")]
    for spoiled in wrong:
        with pytest.raises(ProofError):
            verify_inclusion(index, ROWS, spoiled, path, root)


def test_the_opened_row_gives_no_other_row_away() -> None:
    """A guesser who has row 0's salt, path and the full content of row 1 cannot tell that content from another."""
    path = row_proof(_leaves(), 0)
    guesses = [s + b"agent-1\x00" + SHAPE + row_bytes([A, B], 1) for s in (row_salt(SALT, 0), bytes(16), b"")]
    assert not {leaf_hash(g) for g in guesses} & set(path)
    assert leaf_hash(row_salt(SALT, 1) + b"agent-1\x00" + SHAPE + row_bytes([A, B], 1)) == path[0]


def test_every_part_of_a_commitment_matters() -> None:
    roots = [
        commit_rows(author, salt, tensors, ROWS)
        for author, salt, tensors in itertools.product(["", "agent-1", "agent-2"], [SALT, bytes(16)], [[A, B], [B, A]])
    ]
    roots.append(commit_rows("", SALT, [A, dataclasses.replace(B, data=bytes(ROWS))], ROWS))
    assert len(set(roots)) == len(roots)


def test_a_copycat_cannot_open_anothers_digest_as_its_own() -> None:
    """Agent-2 copies agent-1's root into its own output: the same opening does not open it in agent-2's name."""
    header = _header("agent-1", [A, B], ROWS)
    assert open_output(header, opening_of(SALT, [A, B])) == (A, B)
    copied = dataclasses.replace(header, author="agent-2")
    with pytest.raises(MessageError, match="the opening is not what agent-2 signed"):
        open_output(copied, opening_of(SALT, [A, B]))


@pytest.mark.parametrize(
    ("salt", "tensors", "rows", "words"),
    [
        (bytes(15), [A], ROWS, "a salt has 16 bytes, got 15"),
        (SALT, [A], 0, "at least one row"),
        (SALT, [A], ROWS - 1, "does not have 4 rows"),
        (SALT, [A], ROWS + 1, "does not have 6 rows"),
        (SALT, [A, Tensor("s", "int8", (), b"x")], ROWS, "'s' \\[\\] does not have 5 rows"),
        (SALT, [A, Tensor("c", "int8", (4, 1), bytes(4))], ROWS, "'c' \\[4, 1\\] does not have 5 rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(salt: bytes, tensors: list[Tensor], rows: int, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        commit_rows("", salt, tensors, rows)


def test_the_same_bytes_in_another_shape_are_another_commitment() -> None:
    """Or one root could be opened as two values, and an honest output of the one be refuted by the other."""
    scalar, flat, batched = (Tensor("s", "float32", dims, bytes(4)) for dims in ((), (1,), (1, 1)))
    assert len({commit_rows("", SALT, [t], 1) for t in (scalar, flat, batched)}) == 3
    renamed, retyped = (dataclasses.replace(flat, **change) for change in ({"name": "t"}, {"dtype": "int32"}))
    assert len({commit_rows("", SALT, [t], 1) for t in (flat, renamed, retyped)}) == 3
    assert commit_rows("", SALT, [A], 1) == hashlib.sha256(b"\x00" + row_leaf("", SALT, [A], 0, 1)).digest()


# Outputs: bound, opened, and judged against the release.


def _header(author: str, tensors: list[Tensor], rows: int, root: bytes | None = None) -> Output:
    root = commit_rows(author, SALT, tensors, rows) if root is None else root
    return Output(
        ledger=bytes(16), epoch=1, author=author, seq=1, task=bytes(16), expert=bytes(32), input_root=bytes(32),
        rows=rows, outputs=tensor_specs(tensors), output_root=root, provider="CPU", duration_us=1,
    )  # fmt: skip


def _release(*outputs: tuple[str, str, tuple[int, ...], float], batch: bool = True) -> Release:
    specs = tuple((n, t, d, struct.pack(">d", e)) for n, t, d, e in outputs)
    return Release(
        ledger=bytes(16), epoch=1, author="registrar", seq=1, model="toy", expert_name="a", digest=bytes(32), size=1,
        opset=17, memory_mb=1, batch=batch, inputs=(), outputs=specs, owner="ada", issued_ms=1,
    )  # fmt: skip


@pytest.mark.parametrize("field", ["task", "expert", "input_root", "rows"])
def test_an_output_of_another_task_expert_or_input_is_refused_by_name(field: str) -> None:
    envelope = seal_header(SIGNER, _header("agent-1", [A, B], ROWS))
    binding = Binding(bytes(16), bytes(32), bytes(32), ROWS)
    assert parse_output(envelope, binding).header.author == "agent-1"
    other = 7 if field == "rows" else bytes([9] * len(getattr(binding, field)))
    with pytest.raises(MessageError, match=f"output by agent-1: {field} is"):
        parse_output(envelope, dataclasses.replace(binding, **{field: other}))


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        bstr(SALT),
        opening_of(SALT, [A]),
        opening_of(SALT, [B, A]),
        opening_of(bytes(16), [A, B]),
        opening_of(SALT[:15], [A, B]),
        opening_of(SALT, [A, B, B]),
        opening_of(SALT, [A, B])[:-1],
        opening_of(SALT, [A, B]) + b"\x00",
        opening_of(SALT, [A] * 65),
    ],
)
def test_an_opening_that_is_not_the_one_signed_is_refused(opening: bytes) -> None:
    with pytest.raises(InputError):
        open_output(_header("agent-1", [A, B], ROWS), opening)


RELEASE = _release(("a", "float32", (0, 2), 1e-5), ("b", "int8", (0, 1), 0.0))
NAN = Tensor("a", "float32", (ROWS, 2), np.full(10, np.nan, "<f4").tobytes())


@pytest.mark.parametrize(
    ("tensors", "rows"),
    [
        ([NAN, B], ROWS),
        ([dataclasses.replace(NAN, data=np.full(10, np.inf, "<f4").tobytes()), B], ROWS),
        ([dataclasses.replace(A, name="z"), B], ROWS),
        ([dataclasses.replace(A, dtype="int32"), B], ROWS),
        ([Tensor("a", "float32", (ROWS, 1, 2), A.data), B], ROWS),
        ([A], ROWS),
        ([B, A], ROWS),
    ],
)
def test_a_value_that_the_release_does_not_allow_is_unusable_and_no_error(tensors: list[Tensor], rows: int) -> None:
    assert candidate_of(_header("agent-1", tensors, rows), tensors, RELEASE) is None
    good = candidate_of(_header("agent-1", [A, B], ROWS), [A, B], RELEASE)
    assert good is not None and good.tensors == (A.data, B.data)


@pytest.mark.parametrize(("dims", "batch"), [((0, 0, 0), True), ((0, 0), False)])
def test_a_liar_who_signs_the_right_bytes_in_another_shape_is_contradicted(dims: tuple[int, ...], batch: bool) -> None:
    """[2, 3] and [3, 2] have equal bytes: without its dims a liar's shape could be the one accepted."""
    release, rows = _release(("y", "float32", dims, 1e-5), batch=batch), (1,) if batch else ()
    values = np.arange(6, dtype="<f4").tobytes()
    true, lie = (Tensor("y", "float32", (*rows, *shape), values) for shape in ((2, 3), (3, 2)))
    found = [candidate_of(_header(name, [t], 1), [t], release) for name, t in (("agent-1", true), ("agent-2", lie))]
    assert found[0] is not None and found[1] is not None
    assert distance(found[0], found[1], tolerances_of(release)) == math.inf
    assert unpack_dims(found[1].tensors[1]) == (*rows, 3, 2)


def test_a_shape_that_the_bytes_tell_is_not_said_twice() -> None:
    release = _release(("y", "float32", (0, 0, 3), 1e-5))
    assert [t.epsilon for t in tolerances_of(release)] == [1e-5]


def test_dims_that_are_none_are_refused() -> None:
    for data in (b"x", bytes(8 * 9)):
        with pytest.raises(MessageError, match="dims are at most 8 int64"):
            unpack_dims(data)


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ManifestError):
        tolerances_of(_release(("y", "float32", (0, 2), epsilon)))


def test_the_error_of_a_wrong_shape_says_both_shapes() -> None:
    with pytest.raises(MessageError, match=r"expected 'y' float32\[2, 'any', 3\], found 'y' float32\[2, 5, 4\]"):
        check_specs([Tensor("y", "float32", (2, 5, 4), bytes(160))], [("y", "float32", (0, 0, 3))], 2)
