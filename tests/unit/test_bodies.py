"""Bodies: whole or refused, never more than the limit in memory, however they are packed, cut up or left unfinished."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.protocol.errors import BmoeError, InputError, LimitError, MessageError, UnavailableError
from coordinator import bodies
from coordinator.bodies import Bodies, decompressed, read_body

LIMIT = 1 << 20


def sent(*parts: bytes, whole: bool = True) -> Callable[[], Awaitable[dict[str, Any]]]:
    """What a server receives: the parts, then the end of the body, or of the connection."""
    messages = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    if whole and messages:
        messages[-1]["more_body"] = False
    queue = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(queue, {"type": "http.disconnect"})

    return receive


def read(receive: Any, limit: int = LIMIT, most: int = 8 * LIMIT, **headers: bytes) -> bytes:
    with Bodies(most).held("t") as count:
        given = {name.replace("_", "-").encode(): value for name, value in headers.items()}
        return asyncio.run(read_body(given, receive, limit, count))


@given(st.binary(max_size=2000), st.integers(1, 700), st.sampled_from([b"", b"identity", b"gzip", b"deflate"]))
def test_a_body_comes_back_as_it_was_however_it_is_cut_and_packed(data: bytes, cut: int, packed: bytes) -> None:
    raw = {b"gzip": gzip.compress, b"deflate": zlib.compress}.get(packed, bytes)(data)
    parts = [raw[at : at + cut] for at in range(0, len(raw), cut)] or [b""]
    assert read(sent(*parts), content_encoding=packed) == data


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "br", ""]))
def test_any_bytes_are_decompressed_or_refused_in_one_line(data: bytes, encoding: str) -> None:
    try:
        assert len(decompressed(data, encoding, 1000)) <= 1000
    except BmoeError as error:
        assert "\n" not in str(error) and len(str(error)) < 200


@pytest.mark.parametrize("make", [gzip.compress, zlib.compress])
def test_a_bomb_costs_no_more_than_the_limit(make: Callable[[bytes], bytes]) -> None:
    bomb = make(bytes(16 * LIMIT))
    assert len(bomb) < LIMIT // 50
    tracemalloc.start()
    with pytest.raises(LimitError, match="when decompressed"):
        decompressed(bomb, "gzip", LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LIMIT


@pytest.mark.parametrize(
    "raw",
    [gzip.compress(b"x" * 99)[:-1], gzip.compress(b"x") + b"y", gzip.compress(b"x") * 2, zlib.compress(b"x" * 99)[:-5]],
    ids=["cut short", "more behind", "two", "deflate cut short"],
)
def test_half_a_stream_and_more_than_one_are_refused(raw: bytes) -> None:
    with pytest.raises(MessageError, match="not one whole"):
        decompressed(raw, "gzip", LIMIT)


def test_a_body_beyond_the_limit_is_refused_whether_it_says_so_or_not() -> None:
    with pytest.raises(LimitError, match="at most 1048576 are taken"):
        read(sent(b"x" * (LIMIT + 1)))
    with pytest.raises(LimitError):
        read(sent(*[b"x" * 65536] * 17))
    with pytest.raises(LimitError, match="has 999999999 bytes"):
        read(sent(), content_length=b"999999999")
    for odd in (b"-1", b"1e3", b"", b"9" * 40, "٣".encode()):
        with pytest.raises(MessageError, match="must be a length"):
            read(sent(b""), content_length=odd)


def test_a_client_that_goes_away_or_stalls_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="went away"):
        read(sent(b"half", whole=False))
    monkeypatch.setattr(bodies, "BODY_S", 0.01)

    async def nothing() -> dict[str, Any]:
        return await asyncio.get_running_loop().create_future()

    with pytest.raises(InputError, match="did not come within"):
        read(nothing)


def test_all_bodies_together_have_a_limit_and_one_tenant_has_half_of_it() -> None:
    held = Bodies(1000)
    with held.held("hungry") as hungry, held.held("other") as other:
        hungry(400)
        with pytest.raises(UnavailableError, match="no room"):
            hungry(101)
        other(500)
        with held.held("third") as third, pytest.raises(UnavailableError):
            third(101)
    with held.held("hungry") as again:
        again(500)
