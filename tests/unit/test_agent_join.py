"""Joining, against the real fleet server: tokens spoiled in every way, impostors, lost replies, and joining anew."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_gateway import FleetServer, device_spki

from bmoe.protocol.encoding import encode
from bmoe.protocol.errors import ConfigError, MessageError, RefusedError, UnavailableError
from bmoe.protocol.join_token import PREFIX, JoinToken, parse_token
from bmoe.protocol.keys import Signer
from bmoe.protocol.tls import mutual_tls
from edge_agent import cli
from edge_agent import join as join_module
from edge_agent.certificates import ensure, is_due, renew, wait_for
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, identity_file, load_identity
from edge_agent.join import join
from edge_agent.trust import Trust

TOKEN = JoinToken("https://192.168.1.10:8443", b"t" * 8, b"s" * 16, b"p" * 32)


def spelled(*values: object) -> str:
    return PREFIX + base64.urlsafe_b64encode(encode(list(values))).rstrip(b"=").decode()


def test_a_token_survives_copying_with_blanks_around_it() -> None:
    assert parse_token(f"  {TOKEN.text()}\n") == TOKEN


@pytest.mark.parametrize(
    "text",
    [
        "", "bmoe1.", "bmoe2." + TOKEN.text()[6:], TOKEN.text()[:-1], TOKEN.text()[:-4], TOKEN.text() + "A",
        TOKEN.text().replace("bmoe1.", "bmoe1. "), TOKEN.text() + "=", "bmoe1." + "A" * 2000, "bmoe1.é",
        spelled(TOKEN.url, b"t" * 7, b"s" * 16, b"p" * 32), spelled(TOKEN.url, b"t" * 8, b"s" * 16),
        spelled(TOKEN.url, b"t" * 8, b"s" * 16, b"p" * 32, 1), spelled(1, b"t" * 8, b"s" * 16, b"p" * 32),
        spelled("http://192.168.1.10:8443", b"t" * 8, b"s" * 16, b"p" * 32),
        spelled("https://192.168.1.10:8443/path", b"t" * 8, b"s" * 16, b"p" * 32),
        spelled("https://user@host:1", b"t" * 8, b"s" * 16, b"p" * 32),
        spelled("https://host:99999", b"t" * 8, b"s" * 16, b"p" * 32),
        spelled("https://", b"t" * 8, b"s" * 16, b"p" * 32),
    ],
)  # fmt: skip
def test_a_spoiled_token_is_refused_before_anything_is_done(text: str) -> None:
    with pytest.raises(MessageError, match=r"token|gateway's address"):
        parse_token(text)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FleetServer]:
    async with FleetServer(tmp_path / "gateway").running() as server:
        yield server


async def joined(state: Path, token: str, name: str | None = None, force: bool = False) -> Identity:
    return await asyncio.to_thread(join, state, token, name=name, gateway=None, force=force)


async def test_a_board_joins_and_finds_itself_again_after_a_restart(server: FleetServer, tmp_path: Path) -> None:
    identity = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    assert (identity.name, identity.owner, identity.ledger) == ("kitchen-pi", "acme", server.ledger.ledger)
    assert identity.registrar == server.registrar.public_key
    again = load_identity(tmp_path / "board")
    assert again.signer.public_key == identity.signer.public_key
    assert dataclasses.replace(again, signer=identity.signer) == identity
    for secret in (identity.key, identity.folder / "signing.key"):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert identity.folder.stat().st_mode & 0o777 == 0o700
    assert not list(identity.folder.glob("request*")), "the spent token's secret is not kept"
    files = (identity.ca, identity.certificate, identity.key)
    fleet = FleetClient(server.url, lambda: mutual_tls(*files))
    assert len((await asyncio.to_thread(fleet.get_json, "/v1/members"))["members"]) == 1


async def test_without_a_name_one_is_proposed_and_the_tokens_own_counts(server: FleetServer, tmp_path: Path) -> None:
    proposed = await joined(tmp_path / "one", server.token())
    assert proposed.name.endswith(proposed.signer.key_id[:2].hex())
    bound = await joined(tmp_path / "two", server.token(name="garden-pi"))
    assert bound.name == "garden-pi"
    with pytest.raises(RefusedError, match="is for garden-pi"):
        await joined(tmp_path / "three", server.token(name="garden-pi"), "kitchen-pi")


async def test_a_reply_that_got_lost_does_not_strand_the_board(server: FleetServer, tmp_path: Path) -> None:
    token = server.token()
    server.swallow = 1
    with pytest.raises(UnavailableError, match=r"bytes missing|connection broke"):
        await joined(tmp_path / "board", token, "kitchen-pi")
    assert len(server.ledger.entered) == 1, "the token is spent, the ledger knows the board"
    with pytest.raises(ConfigError, match="has not joined"):
        load_identity(tmp_path / "board")

    with pytest.raises(ConfigError, match="--name kitchen-pi"):
        await joined(tmp_path / "board", token, "other")
    identity = await joined(tmp_path / "board", token)
    assert identity.name == "kitchen-pi" and len(server.ledger.entered) == 1
    with pytest.raises(RefusedError, match="used already"):
        await joined(tmp_path / "thief", token, "kitchen-pi")


async def test_joining_again_needs_force_and_keeps_key_and_name_but_not_the_tls_key(
    server: FleetServer, tmp_path: Path
) -> None:
    first = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    tls = device_spki(first.key)
    with pytest.raises(ConfigError, match="joined already, as kitchen-pi"):
        await joined(tmp_path / "board", server.token())
    second = await joined(tmp_path / "board", server.token(), force=True)
    assert (second.name, second.signer.public_key) == ("kitchen-pi", first.signer.public_key)
    assert device_spki(second.key) != tls
    assert not first.folder.exists(), "the replaced certificate's key is gone"


async def test_what_refused_attempts_left_goes_with_the_next_join(server: FleetServer, tmp_path: Path) -> None:
    """Each has keys and a request with a token's secret, which may be good for another board still."""
    for _ in range(2):
        with pytest.raises(RefusedError, match="is for garden-pi"):
            await joined(tmp_path / "board", server.token(name="garden-pi"), "kitchen-pi")
    identity = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    assert sorted(os.listdir(identity.folder.parent)) == sorted([identity.folder.name, "identity.json"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it joins for a service that has none of its rights")
async def test_roots_join_for_an_installed_agent_is_the_agents_to_read(server: FleetServer, tmp_path: Path) -> None:
    """What `doctor` advises where a certificate is over. The agent may look as soon as identity.json is there."""
    state = tmp_path / "board"
    await joined(state, server.token(), "kitchen-pi")
    for path in (state, *state.rglob("*")):
        os.chown(path, 61234, 61234)
    assert await asyncio.to_thread(cli.run_command, ["join", server.token(), "--force", "--state", str(state)]) == 0
    found = load_identity(state)
    assert {path.stat().st_uid for path in (state, *state.rglob("*"))} == {61234}
    assert found.name == "kitchen-pi"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(join_module, "_keep", lambda *_: pytest.fail(str({p.stat().st_uid for p in state.rglob("*")})))
        with pytest.raises(pytest.fail.Exception, match=r"^\{61234\}$"):
            await asyncio.to_thread(cli.run_command, ["join", server.token(), "--force", "--state", str(state)])


async def test_a_failed_attempt_to_join_anew_leaves_the_old_identity_whole(server: FleetServer, tmp_path: Path) -> None:
    first = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    server.ledger.away = True
    with pytest.raises(UnavailableError):
        await joined(tmp_path / "board", server.token(), force=True)
    kept = load_identity(tmp_path / "board")
    assert kept.folder == first.folder
    mutual_tls(kept.ca, kept.certificate, kept.key)


async def test_an_impostor_with_another_ca_gets_no_secret(server: FleetServer, tmp_path: Path) -> None:
    async with FleetServer(tmp_path / "impostor").running() as impostor:
        token = parse_token(server.token())
        diverted = dataclasses.replace(token, url=impostor.url).text()
        with pytest.raises(RefusedError, match="somebody stands between"):
            await joined(tmp_path / "board", diverted)
        assert impostor.requests == ["GET /v1/ca"], "the token's secret never left the board"


async def test_refusals_are_passed_on_as_the_gateway_words_them(server: FleetServer, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="reserved"):
        await joined(tmp_path / "one", server.token(), "validator-9")
    await joined(tmp_path / "two", server.token(), "kitchen-pi")
    with pytest.raises(RefusedError, match="taken by another signing key"):
        await joined(tmp_path / "three", server.token(), "kitchen-pi")
    with pytest.raises(ConfigError, match="a-z 0-9"):
        await joined(tmp_path / "four", server.token(), "Kitchen Pi")


@pytest.mark.parametrize("file", ["device.csr", "tls.key"])
async def test_damaged_keys_of_an_earlier_attempt_are_one_clear_line(tmp_path: Path, file: str) -> None:
    token = dataclasses.replace(TOKEN, url="https://127.0.0.1:1").text()
    with pytest.raises(UnavailableError):
        await joined(tmp_path, token)
    [path] = tmp_path.rglob(file)
    path.write_bytes(b"-----BEGIN CERTIFICATE REQUEST-----\ntorn")
    for made in ("request.json", *({"device.csr"} - {file})):
        (path.parent / made).unlink()
    with pytest.raises(ConfigError, match=r"is damaged: .*: delete that folder and join with a new token"):
        await joined(tmp_path, token)


async def test_a_gateway_that_is_not_there_is_named(tmp_path: Path) -> None:
    token = dataclasses.replace(TOKEN, url="https://127.0.0.1:1").text()
    with pytest.raises(UnavailableError, match=r"https://127\.0\.0\.1:1 .*refused"):
        await joined(tmp_path / "board", token)
    assert not identity_file(tmp_path / "board").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../etc"), ("owner", None), ("ledger", "00"), ("epoch", -1), ("epoch", "0"), ("registrar", "ff" * 32),
        ("registrar", Signer.generate().public_key.hex()), ("members", []), ("members", ["AAAA"]), ("members", None),
        ("broker", {"host": "", "port": 1}), ("broker", {"host": "h", "port": 0}), ("url", "ftp://x"),
    ],
)  # fmt: skip
async def test_a_damaged_identity_is_a_clear_error_and_force_mends_it(
    server: FleetServer, tmp_path: Path, field: str, value: object
) -> None:
    state = tmp_path / "board"
    await joined(state, server.token(), "kitchen-pi")
    facts = json.loads(identity_file(state).read_bytes())
    identity_file(state).write_text(json.dumps({**facts, field: value}))
    if (field, value) == ("members", []):
        assert load_identity(state).members == ()  # nobody to believe is no damage: the fleet server is asked
        return
    with pytest.raises(ConfigError, match="join again with --force"):
        load_identity(state)


async def test_certificates_are_renewed_for_the_same_key_after_two_thirds_of_their_life(
    server: FleetServer, tmp_path: Path
) -> None:
    identity = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    old = identity.certificate.read_bytes()
    begin, end = (ssl.cert_time_to_seconds(decoded(identity.certificate)[k]) for k in ("notBefore", "notAfter"))
    assert not is_due(old, begin + (end - begin) * 0.66) and is_due(old, begin + (end - begin) * 0.67)
    files = (identity.ca, identity.certificate, identity.key)
    fleet = FleetClient(identity.url, lambda: mutual_tls(*files))
    await asyncio.to_thread(renew, identity, fleet)
    renewed = identity.certificate.read_bytes()
    assert renewed != old
    mutual_tls(*files)
    await asyncio.to_thread(ensure, identity, fleet)
    assert identity.certificate.read_bytes() == renewed, "not before it is due"


async def test_a_further_session_gets_a_certificate_of_its_own_for_the_same_key(
    server: FleetServer, tmp_path: Path
) -> None:
    identity = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    fleet = FleetClient(identity.url, lambda: mutual_tls(identity.ca, identity.certificate, identity.key))
    await wait_for(identity, fleet, "sub")
    path = identity.certificate_of("sub")
    assert decoded(path)["subject"] == ((("commonName", "kitchen-pi:sub"),),)  # type: ignore[comparison-overlap]
    mutual_tls(identity.ca, path, identity.key)
    with pytest.raises(RefusedError, match="further sessions are pub, sub, source, found 'root'"):
        await asyncio.to_thread(ensure, identity, fleet, "root")
    assert not identity.certificate_of("root").exists()


def decoded(path: Path) -> dict[str, str]:
    return ssl._ssl._test_decode_cert(os.fspath(path))  # type: ignore[attr-defined, no-any-return]


async def test_a_coordinator_certified_later_is_believed_once_asked_for(server: FleetServer, tmp_path: Path) -> None:
    identity = await joined(tmp_path / "board", server.token(), "kitchen-pi")
    files = (identity.ca, identity.certificate, identity.key)
    trust = Trust(identity, FleetClient(identity.url, lambda: mutual_tls(*files)))
    newer = Signer.generate()
    server._certify("coordinator-2", "coordinator", newer.public_key)
    assert newer.key_id not in trust.coordinators
    trust.refresh_soon()
    assert trust._asking is not None
    await trust._asking
    assert newer.key_id in trust.coordinators
    before = len(server.requests)
    trust.refresh_soon()
    await asyncio.sleep(0)
    assert len(server.requests) == before, "at most once a minute, whatever strangers send"
