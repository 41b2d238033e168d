"""The door for SuperNodes: of the SuperLink, whose control API asks nobody who he is, the fleet's paths alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from bmoe.protocol.errors import MessageError
from coordinator.flower.layout import FlowerLayout
from coordinator.flower.register import Node, ask_for, check_supernode_key, read_nodes

OPENSSH = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH


def public(curve: ec.EllipticCurve) -> str:
    return ec.generate_private_key(curve).public_key().public_bytes(*OPENSSH).decode()


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/register-node", "/v1/fleet/push-object"])
def test_what_a_supernode_calls_passes(path: str) -> None:
    passes = pytest.importorskip("coordinator.flower.proxy").passes
    assert passes("POST", path.encode(), b"")


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("POST", "/v1/control/start-run", ""), ("POST", "/v1/runtime/acquire-task", ""), ("GET", "/docs", ""),
        ("POST", "/v1/fleet/../control/start-run", ""), ("POST", "/v1/fleet/%2e%2e/control/start-run", ""),
        ("POST", "/v1/fleet/..%2fcontrol", ""), ("POST", "//v1/fleet/pull-messages", ""), ("POST", "/v1/fleet/", ""),
        ("POST", "/v1/fleet/pull-messages/../../control/stop-run", ""), ("POST", "/v1/fleet/pull-messages\n", ""),
        ("POST", "/V1/FLEET/pull-messages", ""), ("GET", "/v1/fleet/pull-messages", ""), ("POST", "", ""),
        ("POST", "/v1/fleet/pull-messages", "x=1"), ("POST", "/v1/fleet/pull-messages;a", ""),
    ],
)  # fmt: skip
def test_everything_else_is_refused_however_it_is_spelled(method: str, path: str, query: str) -> None:
    passes = pytest.importorskip("coordinator.flower.proxy").passes
    assert not passes(method, path.encode(), query.encode())


def test_a_supernodes_key_is_a_p384_key_in_its_one_spelling() -> None:
    good = public(ec.SECP384R1())
    assert check_supernode_key(good) == good
    assert check_supernode_key(good + " a comment") == good
    others = (public(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*OPENSSH).decode())
    for bad in (*others, "ssh-rsa AAAA", "", "x" * 2000, None, 7, {"a": 1}):
        with pytest.raises(MessageError):
            check_supernode_key(bad)


def test_a_device_is_registered_once_its_key_is_that_of_the_superlink(tmp_path: Path) -> None:
    layout, key = FlowerLayout(tmp_path), public(ec.SECP384R1())
    assert not ask_for(layout, "pi-1", key) and not ask_for(layout, "pi-1", key)
    assert (layout.keys / "pi-1.pub").read_text() == key
    layout.nodes.write_text(json.dumps({"pi-1": {"node": 7, "key": key}}))
    assert read_nodes(layout) == {"pi-1": Node(7, key)} and ask_for(layout, "pi-1", key)
    assert not ask_for(layout, "pi-1", public(ec.SECP384R1())), "another key is registered anew"


@pytest.mark.parametrize("damaged", ["", "[]", '{"a": 1}', '{"a": {"node": "x", "key": "k"}}', "{"])
def test_damaged_registrations_are_made_anew(tmp_path: Path, damaged: str) -> None:
    layout = FlowerLayout(tmp_path)
    layout.nodes.write_text(damaged)
    assert read_nodes(layout) == {}


def test_flowers_commands_are_found_where_no_path_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/usr/bin:/bin", None):  # a service's, and none at all
        monkeypatch.setenv("PATH", path) if path else monkeypatch.delenv("PATH")
        first = FlowerLayout(tmp_path).environment()["PATH"].split(os.pathsep)[0]
        assert first == str(Path(sys.executable).parent)
