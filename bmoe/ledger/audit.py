"""The offline auditor: one receipt and one policy file in, plain lines out. Needs no network, no model, no gateway.

Exit codes: 0 the receipt proves what is printed, 1 it does not (one clear line), 2 usage or unreadable files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmoe.ledger.rules.entries import Answer
from bmoe.ledger.rules.policies import verifies
from bmoe.ledger.rules.receipt import Audited, AuditedVerdict, check_request, verify_receipt
from bmoe.ledger.rules.tlog_proof import MAX_PROOF_BYTES
from bmoe.ledger.rules.trust import MAX_TRUST_BYTES, parse_trust
from bmoe.protocol.errors import BmoeError, ConfigError
from bmoe.protocol.tensors import Tensor

DOES_NOT_VERIFY, BAD_USAGE = 1, 2
REQUEST_BYTES = 64 * 1024 * 1024
STANCES = {"a": "agrees", "n": "neutral", "d": "dissents", "u": "unusable", "i": "not judged"}
ROWS_SHOWN, VALUES_SHOWN = 8, 8


def main(argv: Sequence[str] | None = None) -> int:
    """Audit one receipt; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        text = _read(arguments.file, MAX_PROOF_BYTES)
        trust_file = arguments.trust or arguments.file.parent / "trust.json"
        if arguments.trust is None and not trust_file.is_file():
            raise ConfigError(f"no policy file: give --trust FILE, or put trust.json beside {arguments.file}")
        trust = parse_trust(_read(trust_file, MAX_TRUST_BYTES))
        request = _read(arguments.request, REQUEST_BYTES) if arguments.request else None
    except ConfigError as error:
        return _say(f"audit: {error}", BAD_USAGE)
    try:
        audited = verify_receipt(text, trust)
        if request is not None:
            _check_request(audited, request)
    except ConfigError as error:
        return _say(f"audit: {error}", BAD_USAGE)
    except BmoeError as error:
        return _say(f"DOES NOT VERIFY: {error}", DOES_NOT_VERIFY)
    facts = describe(audited, request is not None)
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(lines(facts)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bmoe audit", description="Verify a receipt offline.")
    parser.add_argument("file", type=Path, help="the receipt")
    parser.add_argument("--trust", type=Path, help="policy file (default: trust.json beside the receipt)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--request", type=Path, help="opening of the request: also check that it is the one answered")
    return parser


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code


def _read(path: Path, cap: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(data) > cap:
        raise ConfigError(f"{path} is larger than the {cap} bytes that can be right")
    return data


def _check_request(audited: Audited, opening: bytes) -> None:
    if not isinstance(audited.entry, Answer):
        raise ConfigError("--request needs the receipt of an answer, this one is of a verdict")
    check_request(audited.entry, audited.release, opening)


def describe(audited: Audited, request_checked: bool = False) -> dict[str, Any]:
    """What a receipt proved, as plain JSON values."""
    entry = audited.entry
    own = {"request": entry.request.hex(), "version": entry.version} if isinstance(entry, Answer) else {}
    recomputed = [*audited.recomputed, *(["the request given is the one answered"] if request_checked else [])]
    return {
        "verified": True,
        "kind": audited.kind,
        "assurance": "unverified" if not all(verifies(v.entry.policy) for v in audited.verdicts) else "verified",
        "ledger": entry.ledger.hex(),
        "epoch": entry.epoch,
        "model": entry.model,
        **own,
        "entered_by": entry.author,
        "entered_at": _iso(entry.time_ms / 1000),
        "leaf": audited.index,
        "checkpoint": {"size": audited.size, "root": audited.root.hex()},
        "cosigned": [{"validator": name, "at": _iso(at)} for name, at in audited.cosigned],
        "verdicts": [_verdict(v) for v in audited.verdicts],
        "result": [_tensor(t) for t in audited.result] if audited.result is not None else None,
        "recomputed": recomputed,
        "relied_on": list(audited.relied_on),
    }


def _verdict(verdict: AuditedVerdict) -> dict[str, Any]:
    entry = verdict.entry
    return {
        "task": entry.task.hex(),
        "leaf": verdict.index,
        "expert": entry.expert.hex(),
        "rows": entry.rows,
        "tenant": entry.tenant,
        "policy": f"{entry.policy} {entry.policy_version}",
        "outcome": entry.outcome,
        "accepted_from": verdict.accepted_from or None,
        "referee": verdict.referee or None,
        "agents": [
            {"agent": a, "owner": o, "stance": STANCES.get(s, s), "provider": provider}
            for (a, o, s), provider in zip(verdict.agents, verdict.providers, strict=True)
        ],
        "value": [_tensor(t) for t in verdict.value] if verdict.value is not None else None,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    """A tensor's name, dtype, dims, first values, and for a 2-D float tensor the index of each row's largest value."""
    array = np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.dims)
    shown = [v if np.isfinite(v) else str(v) for v in array.ravel()[:VALUES_SHOWN].tolist()]
    facts: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "dims": list(tensor.dims), "values": shown}
    if array.ndim == 2 and array.dtype.kind == "f" and array.shape[1]:
        facts["argmax"] = array.argmax(axis=1)[:ROWS_SHOWN].tolist()
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """The same facts for a reader."""
    name = f"request {facts['request']}" if facts["kind"] == "answer" else f"task {facts['verdicts'][0]['task']}"
    found = [
        f"{_title(facts)}: the {facts['kind']} to {name}, model {facts['model']}",
        f"  ledger      {facts['ledger']} epoch {facts['epoch']}, leaf {facts['leaf']}",
        f"  entered     {facts['entered_at']} by {facts['entered_by']}",
        f"  checkpoint  size {facts['checkpoint']['size']}, root {facts['checkpoint']['root']}",
        *[f"  cosigned    {c['at']} by {c['validator']}" for c in facts["cosigned"]],
    ]
    for verdict in facts["verdicts"]:
        accepted = f"accepts the value of {verdict['accepted_from']}" if verdict["accepted_from"] else "accepts nothing"
        found.append(f"verdict on task {verdict['task']} (leaf {verdict['leaf']}): {verdict['outcome']}, {accepted}")
        found.append(f"  policy      {verdict['policy']}, expert {verdict['expert'][:16]}, {verdict['rows']} rows")
        found += [
            f"  agent       {a['agent']} of {a['owner']}: {a['stance']}, on {a['provider']}" for a in verdict["agents"]
        ]
        if verdict["referee"]:
            found.append(f"  referee     {verdict['referee']} executed it again")
        found += [f"  value       {_tensor_line(t)}" for t in verdict["value"] or ()]
    found += [f"result        {_tensor_line(t)}" for t in facts["result"] or ()]
    found += [f"recomputed:   {text}" for text in facts["recomputed"]]
    found += [f"on the validators' word: {text}" for text in facts["relied_on"]]
    return found


def _title(facts: dict[str, Any]) -> str:
    """What the reader may conclude: a policy that takes one agent's word leaves an entry true and its value unverified."""
    if facts["assurance"] == "verified":
        return "VERIFIED"
    return "ON THE LEDGER, BUT UNVERIFIED (policy single takes one agent's word)"


def _tensor_line(tensor: dict[str, Any]) -> str:
    more = " ..." if int(np.prod(tensor["dims"])) > len(tensor["values"]) else ""
    values = " ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in tensor["values"])
    argmax = f", argmax {' '.join(map(str, tensor['argmax']))}" if "argmax" in tensor else ""
    return f"{tensor['name']!a} {tensor['dtype']}{tensor['dims']}: {values}{more}{argmax}"


def _iso(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s after 1970"


if __name__ == "__main__":
    sys.exit(main())
