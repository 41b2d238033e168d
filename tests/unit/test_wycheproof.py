"""Ed25519 as we call it, against the public vectors made to break it."""

from __future__ import annotations

import json

from vectors import vectors

from bmoe.protocol.keys import verify_ed25519


def test_every_public_ed25519_case_is_judged_as_published() -> None:
    published = json.loads(vectors("wycheproof/ed25519_test.json").read_text())
    wrong, count = [], 0
    for group in published["testGroups"]:
        public_key = bytes.fromhex(group["publicKey"]["pk"])
        for case in group["tests"]:
            valid = verify_ed25519(public_key, bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"]))
            count += 1
            if valid != (case["result"] == "valid"):
                wrong.append(f"{case['tcId']}: {case['comment']}")
    assert wrong == []
    assert count == published["numberOfTests"] == 151
