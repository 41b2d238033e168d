"""No log of a running fleet holds a secret: not a token, not a key, in any spelling."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from live_fleet import LiveFleet

from bmoe.protocol.errors import BmoeError
from edge_agent.join import join

pytestmark = pytest.mark.asyncio(loop_scope="session")
SPOKEN_BYTES = 20  # a shorter run of characters could stand anywhere


def spellings(secret: bytes) -> set[bytes]:
    """How a secret could come to stand in a log."""
    return {secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret).rstrip(b"=")}


def secrets_of(folder: Path) -> dict[str, set[bytes]]:
    """Every private key under a folder: raw, or the lines of a PEM file or seed."""
    found: dict[str, set[bytes]] = {}
    for path in [p for p in folder.rglob("*") if p.suffix in (".key", ".nk") and p.is_file()]:
        data = path.read_bytes()
        lines = {line for line in data.splitlines() if len(line) >= SPOKEN_BYTES and not line.startswith(b"-----")}
        found[str(path)] = spellings(data) if len(data) == 32 else lines
    return found


async def test_no_token_and_no_key_is_ever_logged(fleet: LiveFleet, tmp_path: Path) -> None:
    tokens = [await fleet.token(owner="ada"), await fleet.token(owner="bob", name="log-reader")]
    join(tmp_path / "reader", tokens[1], name="log-reader", gateway=None, force=False)
    with pytest.raises(BmoeError):  # a used token is refused, which is logged, too
        join(tmp_path / "thief", tokens[1], name="thief", gateway=None, force=False)
    await fleet.answers_right()
    local = fleet.fleet
    secrets = {**secrets_of(local.root), **secrets_of(tmp_path)}
    assert len(secrets) > 10 and all(secrets.values())
    for token in tokens:
        secret = token.removeprefix("bmoe1.")
        secrets[f"token {token[:12]}"] = {token.encode(), secret[-32:].encode(), secret[8:48].encode()}
    logs = [*local.logs.glob("*.log"), *(local.state / "logs").iterdir(), *local.state.glob("*/nats.log")]
    assert len(logs) >= 9
    text = b"\n".join(path.read_bytes() for path in logs)
    assert b"token_created" in text and b"enrolment_refused" in text, "the logs that might hold them are there"
    told = [name for name, words in secrets.items() if any(word in text for word in words)]
    assert not told, f"in a log: {told}"
