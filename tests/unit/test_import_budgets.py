"""Imports have a budget: a fresh interpreter loads a part, and we look at what came with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AUDITOR = {"cryptography", "cbor2", "numpy", "bmoe"}
# Processes of their own, which an agent starts and never imports.
UPDATER = ("edge_agent.install_version", "edge_agent.trusted", "edge_agent.update_https", "edge_agent.flower.client")
PROBE = (
    f"UPDATER = {UPDATER!r}"
    + """
import importlib, json, pkgutil, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    module = importlib.import_module(name.removesuffix(".*"))
    if name.endswith(".*"):
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            if found.name not in ("bmoe.protocol.link", "bmoe.protocol.connection", *UPDATER):
                importlib.import_module(found.name)
tops = {m.split(".")[0] for m in set(sys.modules) - before}
ours = sorted(m for m in sys.modules if m.split(".")[0] in ("bmoe", "edge_agent", "coordinator"))
print(json.dumps({"foreign": sorted(tops - set(sys.stdlib_module_names)), "ours": ours}))
"""
)


def _loaded(*names: str) -> tuple[set[str], list[str]]:
    """(top-level packages outside the standard library, our modules) that a fresh interpreter has after importing."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # A library's compiled helpers (_cffi_backend and the like) come with it and are no choice of ours.
    return {name for name in found["foreign"] if not name.startswith("_")}, found["ours"]


def test_an_auditor_needs_cryptography_cbor2_and_numpy_alone() -> None:
    foreign, ours = _loaded("bmoe.protocol.*", "bmoe.ledger.rules.*")
    assert foreign <= AUDITOR and {"bmoe.ledger.rules.receipt", "bmoe.protocol.messages"} <= set(ours)
    assert not [m for m in ours if not m.startswith(("bmoe.protocol", "bmoe.ledger.rules")) and m.count(".") > 1]


def test_the_client_needs_numpy_alone() -> None:
    assert _loaded("bmoe.client")[0] <= {"numpy", "bmoe"}


def test_messages_need_no_numpy() -> None:
    """A board that only signs and forwards pays nothing for arrays."""
    assert "numpy" not in _loaded("bmoe.protocol.messages", "bmoe.protocol.topics", "bmoe.protocol.files")[0]


def test_a_board_loads_no_server_and_nothing_of_the_gateway() -> None:
    foreign, ours = _loaded("edge_agent.*")
    heavy = {"torch", "flwr", "grpc", "fastapi", "starlette", "uvicorn", "nats", "typer", "rich", "tuf", "tinydb"}
    assert not foreign & (heavy | {"structlog"})
    assert not [m for m in ours if m.startswith("coordinator")]


def test_the_import_contract_is_kept() -> None:
    """import-linter's contracts in pyproject.toml; a missing tool is a failure, for then nothing keeps them."""
    tool = Path(sys.executable).parent / "lint-imports"
    assert tool.exists(), f"{tool} is absent: install the extra 'dev'"
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0 and "4 kept, 0 broken" in done.stdout, done.stdout + done.stderr
