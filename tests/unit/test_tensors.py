"""Tensors on the wire: their size is checked once, and rows can be taken, joined and salted apart."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import ITEM_BYTES, MAX_DIM, Tensor, join_rows, row_bytes, row_salt, take_rows, tensor_bytes


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_sizes_are_numpys(dtype: str) -> None:
    array = np.zeros((2, 3), dtype)
    assert tensor_bytes(dtype, (2, 3)) == array.nbytes
    assert Tensor("x", dtype, (2, 3), array.tobytes()).row(1) == array[1].tobytes()
    assert tensor_bytes(dtype, ()) == array.itemsize and tensor_bytes(dtype, (0, 5)) == 0


@pytest.mark.parametrize(
    ("dtype", "dims", "words"),
    [
        ("float8", (1,), "dtype 'float8' is not one of"),
        ("float32", (1,) * 9, "at most 8 dims, got 9"),
        ("float32", (-1,), "0..2\\^31-1"),
        ("float32", (MAX_DIM + 1,), "0..2\\^31-1"),
        ("float32", (2.0,), "must be integers"),
        ("float32", (True,), "must be integers"),
        ("float32", ("2",), "must be integers"),
    ],
)
def test_an_impossible_tensor_is_refused(dtype: str, dims: tuple[int, ...], words: str) -> None:
    with pytest.raises(MessageError, match=words):
        tensor_bytes(dtype, dims)


def test_the_largest_dims_cost_nothing_to_refuse() -> None:
    with pytest.raises(MessageError, match=r"needs \d+ bytes, got 1"):
        Tensor("x", "float64", (MAX_DIM,) * 8, b"\x00")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_joining_and_taking_rows_are_numpys(counts: list[int], width: int) -> None:
    arrays = [np.full((n, width), i, "<i4") for i, n in enumerate(counts)]
    joined = join_rows([Tensor("x", "int32", a.shape, a.tobytes()) for a in arrays])
    expected = np.concatenate(arrays)
    assert joined == Tensor("x", "int32", expected.shape, expected.tobytes())
    some = list(range(len(expected)))[::-2]
    assert take_rows(joined, some).data == expected[some].tobytes() and take_rows(joined, some).dims[0] == len(some)


def test_parts_that_do_not_lie_in_one_batch_are_not_joined() -> None:
    wide, narrow = Tensor("x", "int8", (1, 3), bytes(3)), Tensor("x", "int8", (1, 2), bytes(2))
    with pytest.raises(MessageError):
        join_rows([wide, narrow])


def test_row_bytes_cannot_be_split_in_two_ways() -> None:
    """Each part's length stands before it, so bytes cannot move from one tensor to its neighbour."""
    one = [Tensor("a", "int8", (1, 2), b"ab"), Tensor("b", "int8", (1, 1), b"c")]
    two = [Tensor("a", "int8", (1, 1), b"a"), Tensor("b", "int8", (1, 2), b"bc")]
    assert row_bytes(one, 0) == b"\x00\x00\x00\x02ab\x00\x00\x00\x01c" != row_bytes(two, 0)


def test_each_row_has_a_salt_of_its_own() -> None:
    salts = {row_salt(bytes(16), i) for i in range(4096)} | {row_salt(bytes([1] * 16), 0)}
    assert len(salts) == 4097 and {len(s) for s in salts} == {16}
    assert row_salt(b"s" * 16, 1) == hashlib.sha256(b"bmoe/row-salt/v1" + b"s" * 16 + b"\x00\x00\x00\x01").digest()[:16]
