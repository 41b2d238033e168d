"""The auditor's command: what it says of a true receipt, one line for a false one, and how little it needs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ledger_fixtures import inputs_for, tensor_of
from receipt_ledger import Ledger, answered

from bmoe.ledger.audit import main as audit
from bmoe.ledger.rules.outputs import opening_of
from bmoe.ledger.rules.trust import format_trust


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture
def files(ledger: Ledger, tmp_path: Path) -> tuple[Path, Path]:
    request, _ = answered(ledger)
    receipt = tmp_path / "out" / "receipt.txt"
    receipt.parent.mkdir()
    receipt.write_text(ledger.receipt("answer", request, ledger.seal()))
    trust = tmp_path / "policy.json"
    trust.write_text(format_trust(ledger.fleet.trust))
    return receipt, trust


def test_audit_command_tells_what_was_verified(
    files: tuple[Path, Path], ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, trust = files
    assert audit([str(receipt), "--trust", str(trust)]) == 0
    told = capsys.readouterr().out
    for words in ("VERIFIED: the answer", "agent-2 of owner-agent-2: agrees", "by validator-3", "argmax", "recomputed"):
        assert words in told
    assert audit([str(receipt), "--trust", str(trust), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdicts"][0]["agents"][0] == {
        "agent": "agent-1", "owner": "owner-agent-1", "stance": "agrees", "provider": "CPUExecutionProvider",
    }  # fmt: skip
    (receipt.parent / "trust.json").write_text(trust.read_text())
    assert audit([str(receipt)]) == 0


def test_audit_command_checks_the_request_given(
    files: tuple[Path, Path], ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, trust = files
    request = b"request" + (1).to_bytes(9, "big")
    opening = opening_of(hashlib.sha256(request).digest()[:16], [tensor_of("x", inputs_for(2)[:1])])
    given = tmp_path / "request"
    given.write_bytes(opening)
    assert audit([str(receipt), "--trust", str(trust), "--request", str(given)]) == 0
    given.write_bytes(opening[:-1] + b"\x00")
    assert audit([str(receipt), "--trust", str(trust), "--request", str(given)]) == 1
    assert "not the one that the answer commits to" in capsys.readouterr().err


def test_audit_command_fails_in_one_clear_line(
    files: tuple[Path, Path], ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, trust = files
    assert audit([str(receipt)]) == 2
    assert "no policy file: give --trust FILE" in capsys.readouterr().err
    assert audit([str(tmp_path / "absent"), "--trust", str(trust)]) == 2
    assert audit([str(receipt), "--trust", str(receipt)]) == 2
    capsys.readouterr()
    text = receipt.read_text()
    receipt.write_text(text[: text.rindex("— ")])
    assert audit([str(receipt), "--trust", str(trust)]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("DOES NOT VERIFY: step 2 (checkpoint): a quorum of 3 validators")
    with pytest.raises(SystemExit) as bad:
        audit([])
    assert bad.value.code == 2


def test_auditor_needs_no_engine_no_model_runner_and_no_server() -> None:
    """A fresh interpreter: the auditor's import budget is cryptography, cbor2, numpy and the standard library."""
    code = "import sys, bmoe.ledger.audit; print(*{m.split('.')[0] for m in sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    allowed = {"bmoe", "cryptography", "cbor2", "_cbor2", "numpy", "_cffi_backend", "cffi"}
    foreign = {m for m in told if m not in sys.stdlib_module_names and m not in allowed and not m.startswith("_")}
    assert foreign <= {"sitecustomize", "usercustomize"}, foreign
