"""Join tokens: used once, for whom and as long as the operator said, and repeatable by the same board alone."""

from __future__ import annotations

import base64
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmoe.protocol.encoding import decode
from bmoe.protocol.errors import ConfigError, MessageError, RefusedError
from coordinator.identity.tokens import Grant, TokenStore, spell_token

NOW = 1_800_000_000_000
CSR, KEY = b"c" * 32, b"k" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TokenStore]:
    store = TokenStore(tmp_path / "tokens.db")
    yield store
    store.close()


def test_token_is_spelled_as_the_contract_says() -> None:
    text = spell_token("https://192.168.1.10:8443", b"i" * 8, b"s" * 16, b"p" * 32)
    body = text.removeprefix("bmoe1.")
    assert "=" not in text
    values = decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert values == ("https://192.168.1.10:8443", b"i" * 8, b"s" * 16, b"p" * 32)


def test_token_grants_what_its_operator_wrote_and_only_once(store: TokenStore) -> None:
    token, secret = store.create(None, "acme", "batch 7", 60, NOW)
    assert store.redeem(token, secret, "pi-1", CSR, KEY, NOW) == Grant(None, "acme", "batch 7", NOW + 60_000)
    with pytest.raises(RefusedError, match="used already"):
        store.redeem(token, secret, "pi-2", b"x" * 32, KEY, NOW)
    with pytest.raises(RefusedError, match="used already"):
        store.redeem(token, secret, "pi-1", CSR, b"x" * 32, NOW)


def test_lost_reply_is_repeated_by_the_same_board_even_after_the_token_expired(store: TokenStore) -> None:
    token, secret = store.create(None, "acme", "", 60, NOW)
    first = store.redeem(token, secret, "pi-1", CSR, KEY, NOW)
    assert store.redeem(token, secret, "pi-1", CSR, KEY, NOW + 61_000) == first


def test_expired_token_is_refused_at_its_first_use(store: TokenStore) -> None:
    token, secret = store.create(None, "acme", "", 60, NOW)
    store.check(token, secret, None, CSR, KEY, NOW + 60_000)
    with pytest.raises(RefusedError, match="expired 1 s ago"):
        store.redeem(token, secret, None, CSR, KEY, NOW + 61_000)


def test_token_of_another_name_is_refused_and_stays_good_for_its_own(store: TokenStore) -> None:
    token, secret = store.create("pi-1", "acme", "", 60, NOW)
    with pytest.raises(RefusedError, match="for pi-1, not for pi-2"):
        store.redeem(token, secret, "pi-2", CSR, KEY, NOW)
    assert store.redeem(token, secret, None, CSR, KEY, NOW).name == "pi-1"


@pytest.mark.parametrize("position", [0, 15])
def test_tampered_secret_says_no_more_than_an_unknown_token(store: TokenStore, position: int) -> None:
    token, secret = store.create(None, "acme", "", 60, NOW)
    wrong = bytearray(secret)
    wrong[position] ^= 1
    for shown in ((token, bytes(wrong)), (b"?" * 8, secret)):
        with pytest.raises(RefusedError) as refused:
            store.redeem(*shown, None, CSR, KEY, NOW)
        assert str(refused.value) == "the token is unknown here"
    store.redeem(token, secret, None, CSR, KEY, NOW)


def test_revoked_token_is_refused_and_a_used_one_cannot_be_revoked(store: TokenStore) -> None:
    token, secret = store.create(None, "acme", "", 60, NOW)
    store.revoke(token, NOW)
    with pytest.raises(RefusedError, match="revoked"):
        store.redeem(token, secret, None, CSR, KEY, NOW)
    used, secret = store.create(None, "acme", "", 60, NOW)
    store.redeem(used, secret, None, CSR, KEY, NOW)
    with pytest.raises(RefusedError, match="revoking its device"):
        store.revoke(used, NOW)
    assert {(row.id, row.state) for row in store.list(NOW)} == {(token, "revoked"), (used, "used")}
    assert {row.state for row in store.list(NOW + 61_000)} == {"revoked", "used"}


def test_use_is_on_disk_before_it_is_told_and_secrets_never_are(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    store = TokenStore(path)
    token, secret = store.create(None, "acme", "", 60, NOW)
    store.redeem(token, secret, None, CSR, KEY, NOW)
    with sqlite3.connect(path) as other:  # what another process, or we after a kill, would read
        assert other.execute("SELECT used_ms, csr_digest FROM token").fetchall() == [(NOW, CSR)]
    assert secret not in path.read_bytes() + (tmp_path / "tokens.db-wal").read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()
    again = TokenStore(path)
    with pytest.raises(RefusedError, match="used already"):
        again.redeem(token, secret, None, b"x" * 32, KEY, NOW)
    again.close()


@pytest.mark.parametrize(
    ("name", "owner", "batch", "ttl_s", "fault"),
    [
        ("Pi 1", "acme", "", 60, "device is named"),
        (None, "", "", 60, "owner is named"),
        (None, "acme", "b" * 65, 60, "batch"),
        (None, "acme", "", 0, r"lives 1\.\."),
        (None, "acme", "", 31 * 24 * 3600, r"lives 1\.\."),
    ],
)
def test_operators_mistakes_are_named(
    store: TokenStore, name: str | None, owner: str, batch: str, ttl_s: int, fault: str
) -> None:
    with pytest.raises(MessageError, match=fault):
        store.create(name, owner, batch, ttl_s, NOW)


def test_spoiled_store_is_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    path.write_bytes(b"not a database, but long enough to be looked at" * 20)
    with pytest.raises(ConfigError, match="cannot be used"):
        TokenStore(path)
    assert path.read_bytes().startswith(b"not a database")
