"""Enrolling without a hand: a token left by an installer, clocks that cannot be right, refusals, and what is destroyed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_gateway import FleetServer

from bmoe.protocol.errors import ConfigError, UnavailableError
from edge_agent import clock, enrol
from edge_agent import join as join_module
from edge_agent.enrol import identity_of, joined_anew, name_file, token_file, wait_for_time
from edge_agent.identity import Identity, load_identity
from edge_agent.join import join

HOUR = 3600


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FleetServer]:
    async with FleetServer(tmp_path / "gateway").running() as server:
        yield server


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "board"


def leave(state: Path, token: str, name: str | None = None) -> None:
    token_file(state).parent.mkdir(parents=True, exist_ok=True)
    token_file(state).write_text(token + "\n")
    if name is not None:
        name_file(state).write_text(name + "\n")


async def enrolled(state: Path, within_s: float = 20) -> Identity:
    found = await asyncio.wait_for(identity_of(state, asyncio.Event()), within_s)
    assert found is not None
    return found


async def waiting(state: Path) -> asyncio.Task[Identity | None]:
    return asyncio.ensure_future(identity_of(state, asyncio.Event()))


async def said(caplog: pytest.LogCaptureFixture, text: str, within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while text not in caplog.text:
        assert time.monotonic() < end, caplog.text
        await asyncio.sleep(0.01)


async def test_a_token_that_waits_is_used_and_destroyed(server: FleetServer, state: Path) -> None:
    leave(state, server.token(), "kitchen-pi")
    assert (await enrolled(state)).name == "kitchen-pi"
    assert not token_file(state).parent.exists()
    assert (await enrolled(state)).name == "kitchen-pi", "and a later start needs none"


async def test_without_identity_and_token_it_says_what_to_do(state: Path) -> None:
    with pytest.raises(ConfigError, match="bmoe-agent join TOKEN"):
        await enrolled(state)


async def test_a_gateway_that_is_away_is_asked_again_with_one_line(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "WAIT_S", (0.02, 0.05))
    server.ledger.away = True
    leave(state, server.token())
    joining = await waiting(state)
    await said(caplog, "event=enrolment_waits")
    while server.requests.count("POST /v1/enrol") < 3:  # noqa: ASYNC110 (a list of the server's, no event)
        await asyncio.sleep(0.01)
    server.ledger.away = False
    assert await asyncio.wait_for(joining, 20) is not None
    assert caplog.text.count("event=enrolment_waits") == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("expired", "expired"),
        ("used", "used already"),
        ("other", "is for garden-pi"),
        ("noise", "begins with 'bmoe1.'"),
    ],
)
async def test_a_refused_token_is_one_clear_line_and_a_new_one_is_taken_up_at_once(
    server: FleetServer, state: Path, tmp_path: Path, spoil: str, says: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(enrol, "LOOK_S", 0.02)
    if spoil == "used":
        token = server.token()
        leave(tmp_path / "first", token)
        await enrolled(tmp_path / "first")
    else:
        others = {"expired": server.token(ago_s=700), "other": server.token(name="garden-pi"), "noise": "hello"}
        token = others[spoil]
    leave(state, token, "kitchen-pi")
    joining = await waiting(state)
    await said(caplog, "event=enrolment_refused")
    assert says in caplog.text
    await asyncio.sleep(0.1)
    assert not joining.done() and caplog.text.count("event=enrolment_refused") == 1, "it waits, and does not crash"
    leave(state, server.token())
    identity = await asyncio.wait_for(joining, 20)
    assert identity is not None and identity.name == "kitchen-pi"


async def test_a_board_of_1970_does_not_join_until_its_clock_is_set(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The board's clock alone is shifted; tests/integration/test_board_start.py shifts that of a real process."""
    monkeypatch.setattr(enrol, "WAIT_S", (0.02, 0.05))
    true = time.time
    boot = true()
    monkeypatch.setattr(clock, "now_s", lambda: true() - boot)
    leave(state, server.token())
    joining = await waiting(state)
    await said(caplog, "event=enrolment_waits")
    assert "1970-01-01" in caplog.text and "POST /v1/enrol" not in server.requests
    assert token_file(state).exists() and not joining.done()
    monkeypatch.setattr(clock, "now_s", true)
    assert await asyncio.wait_for(joining, 20) is not None
    assert caplog.text.count("event=enrolment_waits") == 1


async def test_a_card_written_by_a_clock_that_was_ahead_holds_nobody_up(server: FleetServer, state: Path) -> None:
    """A computer that keeps local time is hours ahead; the gateway has the last word."""
    clock.save(state, time.time() + 3 * HOUR)
    leave(state, server.token())
    await enrolled(state)
    assert clock.floor_s(state) <= time.time()


async def test_an_enrolled_board_waits_while_its_clock_is_before_what_has_passed(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "WAIT_S", (0.02, 0.05))
    leave(state, server.token())
    identity = await enrolled(state)
    true, behind = time.time, 10 * HOUR
    clock.save(state)
    monkeypatch.setattr(clock, "now_s", lambda: true() - behind)
    ready = asyncio.ensure_future(wait_for_time(identity, state, asyncio.Event()))
    await said(caplog, "event=clock_wrong")
    assert not ready.done()
    monkeypatch.setattr(clock, "now_s", true)
    await asyncio.wait_for(ready, 20)


async def test_a_floor_saved_by_a_clock_that_was_ahead_yields_to_the_gateway(server: FleetServer, state: Path) -> None:
    leave(state, server.token())
    identity = await enrolled(state)
    clock.save(state, time.time() + 1000 * HOUR)
    await asyncio.wait_for(wait_for_time(identity, state, asyncio.Event()), 20)
    assert clock.floor_s(state) <= time.time()


async def test_the_gateways_time_is_believed_under_its_own_ca_alone(
    server: FleetServer, state: Path, tmp_path: Path
) -> None:
    leave(state, server.token())
    identity = await enrolled(state)
    assert abs(await asyncio.to_thread(clock.gateway_s, server.url, identity.ca) - time.time()) < 5
    async with FleetServer(tmp_path / "impostor").running() as impostor:
        with pytest.raises(UnavailableError, match="certificate is refused"):
            await asyncio.to_thread(clock.gateway_s, impostor.url, identity.ca)


@pytest.mark.parametrize("content", [b"", b"soon", b"-5", b"9" * 20, b"9" * 400, None])
def test_a_damaged_floor_holds_nobody_up(state: Path, content: bytes | None) -> None:
    state.mkdir()
    if content is not None:
        clock.floor_file(state).write_bytes(content)
    assert clock.floor_s(state) == 0
    clock.check_floor(state)
    clock.save(state, 5)
    assert clock.floor_s(state) == 5


async def test_a_further_token_joins_anew_while_it_serves_and_a_refused_one_changes_nothing(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "LOOK_S", 0.02)
    leave(state, server.token(), "kitchen-pi")
    first = await enrolled(state)
    serving = asyncio.ensure_future(joined_anew(state, asyncio.Event()))
    leave(state, server.token(ago_s=700))
    await said(caplog, "event=enrolment_refused")
    assert load_identity(state).folder == first.folder and not serving.done()
    leave(state, server.token())
    await asyncio.wait_for(serving, 20)
    second = load_identity(state)
    assert (second.name, second.folder == first.folder) == ("kitchen-pi", False)
    assert not token_file(state).exists()


async def test_a_further_token_outlasts_a_network_that_comes_later(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that ended while the board was off, a new token on the card, and Wi-Fi that is up a minute later."""
    monkeypatch.setattr(enrol, "LOOK_S", 0.02)
    monkeypatch.setattr(enrol, "WAIT_S", (0.02, 0.05))
    leave(state, server.token())
    first = await enrolled(state)
    server.ledger.away = True
    leave(state, server.token())
    assert (await enrolled(state, 1)).folder == first.folder, "it serves meanwhile, as who it is"
    serving = asyncio.ensure_future(joined_anew(state, asyncio.Event()))
    await said(caplog, "event=enrolment_waits")
    server.ledger.away = False
    await asyncio.wait_for(serving, 20)
    assert load_identity(state).folder != first.folder


async def test_a_join_by_hand_is_noticed_whatever_token_waits(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "LOOK_S", 0.02)
    leave(state, "hello")
    joining = await waiting(state)
    await said(caplog, "event=enrolment_refused")
    await asyncio.to_thread(join, state, server.token(), name="by-hand", gateway=None, force=False)
    found = await asyncio.wait_for(joining, 20)
    assert found is not None and found.name == "by-hand"
    token_file(state).unlink()
    serving = asyncio.ensure_future(joined_anew(state, asyncio.Event()))
    await asyncio.sleep(0.1)
    assert not serving.done()
    await asyncio.to_thread(join, state, server.token(), name=None, gateway=None, force=True)
    await asyncio.wait_for(serving, 20)


async def test_a_full_disk_while_it_joins_is_waited_out(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "WAIT_S", (0.02, 0.05))
    real = join_module.write_durably

    def full(path: Path, data: bytes, mode: int = 0o644) -> None:
        if path.name == "identity.json":
            raise OSError(28, "No space left on device")
        real(path, data, mode)

    monkeypatch.setattr(join_module, "write_durably", full)
    leave(state, server.token())
    joining = await waiting(state)
    await said(caplog, "No space left on device")
    assert token_file(state).exists() and not joining.done()
    monkeypatch.setattr(join_module, "write_durably", real)
    assert await asyncio.wait_for(joining, 20) is not None
    assert len(server.ledger.entered) == 1, "the gateway took it for the same request"


async def test_an_end_between_the_join_and_the_tokens_destruction_is_made_good(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the token's files one lies in `join`, the other is the request; the card's and cloud-init's are gone by then."""
    token = server.token()
    leave(state, token)
    first = await enrolled(state)
    leave(state, token)
    (first.folder / "request.json").write_text(token)
    assert (await enrolled(state)).folder == first.folder
    assert not token_file(state).exists() and "refused" not in caplog.text
    assert not [path for path in state.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert load_identity(state).name == first.name


async def test_a_used_token_that_cannot_be_destroyed_is_not_used_again_and_again(
    server: FleetServer, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody put it there as root, in a folder that the agent cannot write."""
    monkeypatch.setattr(enrol, "LOOK_S", 0.01)

    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(enrol, "shred", read_only)
    leave(state, server.token())
    await enrolled(state)
    assert "event=token_not_destroyed" in caplog.text
    asked = server.requests.count("POST /v1/enrol")
    serving = asyncio.ensure_future(joined_anew(state, asyncio.Event()))
    await asyncio.sleep(0.2)
    assert not serving.done() and server.requests.count("POST /v1/enrol") == asked
    leave(state, server.token())
    await asyncio.wait_for(serving, 20)


async def test_it_ends_at_once_when_told_to(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(state, "hello")
    stop = asyncio.Event()
    joining = asyncio.ensure_future(identity_of(state, stop))
    await said(caplog, "event=enrolment_refused")
    stop.set()
    assert await asyncio.wait_for(joining, 5) is None
