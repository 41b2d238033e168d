"""The policy file: the few facts that an auditor or a validator takes on trust, in one strictly read JSON object.

An anchor names the ledger and who certifies its members; a validator starts from it. A trust adds the validators' keys
and the quorum that a receipt must show. Whoever can write this file decides what its reader believes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.rules.checkpoint import COSIGNATURE_V1, VerifierKey, check_key_name, parse_vkey
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.keys import check_public_key

MAX_TRUST_BYTES = 64 * 1024
MAX_VALIDATORS = 64


@dataclass(frozen=True)
class Anchor:
    """Which ledger, and whose word certifies its members: 16-byte id, epoch, checkpoint origin, Ed25519 public key."""

    ledger: bytes
    epoch: int
    origin: str
    registrar: bytes


@dataclass(frozen=True)
class Trust(Anchor):
    """An anchor with the validators' cosignature keys and how many of them must have signed."""

    validators: tuple[VerifierKey, ...]
    quorum: int


def validator_key(name: str, public_key: bytes) -> VerifierKey:
    """The cosignature key of a validator, as a trust file lists it."""
    return VerifierKey(name, COSIGNATURE_V1, public_key)


def format_trust(trust: Trust) -> str:
    """The policy file's text; parse_trust gives the same trust back."""
    text = json.dumps(
        {
            "ledger": trust.ledger.hex(),
            "epoch": trust.epoch,
            "origin": trust.origin,
            "registrar": trust.registrar.hex(),
            "validators": [key.format() for key in trust.validators],
            "quorum": trust.quorum,
        },
        indent=1,
    )
    parse_trust(text)
    return text + "\n"


def parse_trust(data: str | bytes) -> Trust:
    """The trust that a policy file states; raises ConfigError naming the field, what was expected and what came."""
    values = _fields(data, (*_ANCHOR, "validators", "quorum"))
    anchor = _anchor(values)
    keys = tuple(_vkey(text) for text in _list(values["validators"]))
    if len({key.name for key in keys}) != len(keys) or len({key.public_key for key in keys}) != len(keys):
        raise ConfigError("trust file: two validators share a name or a key, so they could not count as two")
    quorum, needed = values["quorum"], quorum_of(len(keys))
    if type(quorum) is not int or not needed <= quorum <= len(keys):
        raise ConfigError(
            f"trust file: quorum of {len(keys)} validators must be {needed}..{len(keys)}, found {quorum!a}"
        )
    return Trust(**vars(anchor), validators=keys, quorum=quorum)


def parse_anchor(data: str | bytes) -> Anchor:
    """The anchor in a genesis file (ledger, epoch, origin, registrar) or in a whole trust file."""
    values = _load(data)
    if "validators" in values:
        trust = parse_trust(data)
        return Anchor(trust.ledger, trust.epoch, trust.origin, trust.registrar)
    return _anchor(_fields(data, tuple(_ANCHOR)))


def _origin(value: Any) -> str:
    if type(value) is not str or len(value) > 128:
        raise ConfigError(f"trust file: origin must be text of at most 128 characters, found {value!a}")
    try:
        check_key_name(value)
    except InputError as error:
        raise ConfigError(f"trust file: origin: {error}") from error
    return value


def _epoch(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 2**53:
        raise ConfigError(f"trust file: epoch must be an integer in 0..2^53, found {value!a}")
    return value


def _registrar(value: Any) -> bytes:
    try:
        return check_public_key(_hex(value, "registrar", 32))
    except InputError as error:
        raise ConfigError(f"trust file: registrar: {error}") from error


_ANCHOR: dict[str, Callable[[Any], Any]] = {
    "ledger": lambda value: _hex(value, "ledger", 16),
    "epoch": _epoch,
    "origin": _origin,
    "registrar": _registrar,
}


def _anchor(values: dict[str, Any]) -> Anchor:
    return Anchor(**{name: read(values[name]) for name, read in _ANCHOR.items()})


def _hex(value: Any, name: str, length: int) -> bytes:
    raw = None
    if type(value) is str and value == value.lower():
        try:
            raw = bytes.fromhex(value)
        except ValueError:
            raw = None
    if raw is None or len(raw) != length or raw.hex() != value:
        raise ConfigError(f"trust file: {name} must be {2 * length} lower-case hex digits, found {value!a}")
    return raw


def _vkey(text: Any) -> VerifierKey:
    try:
        key = parse_vkey(text if type(text) is str else "")
    except InputError as error:
        raise ConfigError(f"trust file: validators: {error}") from error
    if key.algorithm != COSIGNATURE_V1:
        raise ConfigError(f"trust file: {key.name} has signature type {key.algorithm:#04x}, a validator's has 0x04")
    return key


def _list(value: Any) -> Sequence[Any]:
    if type(value) is not list or not 1 <= len(value) <= MAX_VALIDATORS:
        raise ConfigError(f"trust file: validators must be a list of 1..{MAX_VALIDATORS} verifier keys")
    return value


def _fields(data: str | bytes, names: tuple[str, ...]) -> dict[str, Any]:
    values = _load(data)
    if set(values) != set(names):
        raise ConfigError(f"trust file: expected the fields {', '.join(names)}, found {', '.join(values) or 'none'}")
    return values


def _load(data: str | bytes) -> dict[str, Any]:
    if len(data) > MAX_TRUST_BYTES:
        raise ConfigError(f"trust file: at most {MAX_TRUST_BYTES} bytes, found {len(data)}")
    try:
        values = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"trust file: not JSON: {error}") from error
    if type(values) is not dict:
        raise ConfigError(f"trust file: expected a JSON object, found {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field stands twice")
    return values
