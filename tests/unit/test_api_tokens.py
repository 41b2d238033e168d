"""API tokens: who shows one is known, who does not is nobody; changes count without a restart; no file opens a door."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from bmoe.protocol.errors import AuthenticationError, ConfigError, InputError
from coordinator import access as access_module
from coordinator.access import Access
from coordinator.api_tokens import AdmissionsFile, parse_admissions
from coordinator.tenants import PUBLIC, Tenant


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdmissionsFile:
    monkeypatch.setattr(access_module, "LOOK_EVERY_S", float("-inf"))
    return AdmissionsFile(tmp_path / "api_tokens.json")


def bearer(token: str) -> str:
    return f"Bearer {token}"


def test_without_tokens_all_are_the_public_and_operators_until_the_first_token_is_made(file: AdmissionsFile) -> None:
    access = Access(file.path, required=False)
    assert access.tenant(None, 1.0) == PUBLIC and access.is_operator(None, 1.0)
    token = file.create("clinic")
    with pytest.raises(AuthenticationError, match="wants an API token"):
        access.tenant(None, 2.0)
    assert access.tenant(bearer(token), 2.0) == Tenant("clinic") and not access.is_operator(bearer(token), 2.0)


def test_where_tokens_are_required_nobody_comes_in_before_the_first_is_made(file: AdmissionsFile) -> None:
    with pytest.raises(AuthenticationError):
        Access(file.path, required=True).tenant(None, 1.0)


def test_revoking_the_last_token_opens_nothing_not_even_after_a_restart(file: AdmissionsFile) -> None:
    token = file.create("clinic")
    access = Access(file.path, required=False)
    file.revoke(file.read().tokens[0].id)
    for later in (access, Access(file.path, required=False)):
        for shown in (None, bearer(token)):
            with pytest.raises(AuthenticationError):
                later.tenant(shown, 5.0)


def test_limits_are_the_tenants_whichever_token_it_shows_and_its_boards(file: AdmissionsFile) -> None:
    first, second = file.create("clinic"), file.create("clinic", operator=True)
    access = Access(file.path, required=False)
    limits = Tenant("clinic", frozenset({"wearable"}), 5.0, 10, 2)
    file.limit(limits)
    assert access.tenant(bearer(first), 1.0) == access.tenant(bearer(second), 1.0) == access.owner("clinic") == limits
    assert access.is_operator(bearer(second), 1.0) and access.owner("ada") == Tenant("ada")


def test_an_expired_token_is_told_so(file: AdmissionsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    token = file.create("clinic", days=1)
    access = Access(file.path, required=False)
    soon = file.read().tokens[0].expires_ms + 1
    monkeypatch.setattr("coordinator.access.time.time_ns", lambda: soon * 1_000_000)
    with pytest.raises(AuthenticationError, match="has expired"):
        access.tenant(bearer(token), 1.0)


@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", "Bearer ", "Basic bmoek.x", "Bearer bmoek.x", "Bearer " + "x" * 9999, "\xff\x00", "Bearer é"],
)
def test_what_is_no_token_names_nobody(file: AdmissionsFile, shown: str) -> None:
    file.create("clinic")
    with pytest.raises(AuthenticationError) as refused:
        Access(file.path, required=False).tenant(shown, 1.0)
    assert "x" * 20 not in str(refused.value), "a refusal repeats no secret"


def test_the_file_holds_digests_for_its_owner_alone(file: AdmissionsFile) -> None:
    token = file.create("clinic")
    assert token not in file.path.read_text() and file.path.stat().st_mode & 0o077 == 0


def test_a_file_damaged_while_we_run_changes_nothing_and_at_the_start_is_named(file: AdmissionsFile) -> None:
    token = file.create("clinic")
    access = Access(file.path, required=False)
    file.path.write_text(file.path.read_text()[:-20])
    assert access.tenant(bearer(token), 9.0).name == "clinic"
    for act in (lambda: Access(file.path, required=False), lambda: file.create("other")):
        with pytest.raises(ConfigError, match="is damaged"):
            act()


GOOD = {"id": "0" * 8, "sha256": "0" * 64, "tenant": "a", "operator": False, "created_ms": 0, "expires_ms": 1}
LIMITS = {"name": "a", "models": None, "rate": 0, "burst": 0, "concurrent": 0}


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2}, {"wanted": 1}, {"tokens": None}, {"tenants": {}}, {"more": 1}, {"tokens": [{}]},
        {"tokens": [{**GOOD, "sha256": "x"}]}, {"tokens": [{**GOOD, "operator": 1}]},
        {"tokens": [{**GOOD, "tenant": "A b"}]}, {"tokens": [{**GOOD, "expires_ms": 1.5}]},
        {"tenants": [{**LIMITS, "rate": -1}]}, {"tenants": [{**LIMITS, "rate": True}]},
        {"tenants": [{**LIMITS, "models": ["../x"]}]}, {"tenants": [{**LIMITS, "burst": 10**9}]},
    ],
)  # fmt: skip
def test_every_field_of_the_file_is_checked(changed: dict[str, object]) -> None:
    whole = {"format": 1, "wanted": True, "tenants": [LIMITS], "tokens": [GOOD]}
    parse_admissions(json.dumps(whole).encode(), Path("f"))
    with pytest.raises(ConfigError, match=r"f is damaged \(\$"):
        parse_admissions(json.dumps({**whole, **changed}).encode(), Path("f"))


@pytest.mark.parametrize(
    ("tenant", "days"),
    [("", 1), ("No Name", 1), ("x" * 65, 1), ("ok", 0), ("ok", -1), ("ok", 9999), ("ok", float("nan"))],
)
def test_what_cannot_be_is_refused_at_the_command(file: AdmissionsFile, tenant: str, days: float) -> None:
    with pytest.raises(InputError):
        file.create(tenant, days=days)
    assert not file.path.exists()


def _create(path: Path) -> None:
    AdmissionsFile(path).create("clinic")


def test_commands_that_run_at_once_lose_nothing(file: AdmissionsFile) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_create, args=(file.path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert len(file.read().tokens) == 4
