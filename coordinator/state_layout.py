"""Where everything lies under the one state directory of a gateway."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError


@dataclass(frozen=True)
class StateLayout:
    """Paths below `--state`. Nothing is written anywhere else."""

    root: Path

    @property
    def identity(self) -> Path:
        """CA, registrar key, tokens and certificates: the registrar's alone, but for pki/."""
        return self.root / "identity"

    def certificate(self, name: str) -> Path:
        """The TLS certificate of one of the gateway's own processes."""
        return self.identity / "pki" / f"{name}.pem"

    def key(self, name: str) -> Path:
        """Its private key."""
        return self.identity / "pki" / f"{name}.key"

    @property
    def ca(self) -> Path:
        """The gateway CA's certificate."""
        return self.identity / "ca.pem"

    @property
    def genesis(self) -> Path:
        """Which ledger this is: id, epoch, origin, registrar key."""
        return self.root / "genesis.json"

    @property
    def trust(self) -> Path:
        """The policy file an auditor is given: validators, quorum, registrar key."""
        return self.root / "trust.json"

    @property
    def signing_key(self) -> Path:
        """The coordinator's Ed25519 key."""
        return self.root / "coordinator" / "coordinator.key"

    @property
    def fleet(self) -> Path:
        """The coordinator's view of the fleet, rebuilt from the ledger at will."""
        return self.root / "coordinator" / "fleet.json"

    @property
    def evidence(self) -> Path:
        """Inputs and large outputs, for re-execution."""
        return self.root / "evidence" / "evidence.db"

    @property
    def blobs(self) -> Path:
        """ONNX files by SHA-256."""
        return self.root / "blobs"

    @property
    def ports(self) -> Path:
        """The ports in use, remembered."""
        return self.root / "ports.json"

    def validator(self, name: str) -> Path:
        """A validator's folder."""
        return self.root / name

    def logs(self) -> Path:
        """Where our processes log."""
        return self.root / "logs"


@dataclass(frozen=True)
class LedgerId:
    """Which ledger this gateway writes and who may write it: the public keys of its registrar and processes.

    `authors` maps coordinator and validator names to their 32-byte Ed25519 public keys.
    """

    ledger: bytes
    epoch: int
    origin: str
    registrar: bytes
    authors: dict[str, bytes]

    @property
    def validators(self) -> dict[str, bytes]:
        """The validators' keys by name."""
        return {n: k for n, k in self.authors.items() if n.startswith("validator-")}

    def to_json(self) -> bytes:
        """The file's content."""
        facts = {
            "ledger": self.ledger.hex(),
            "epoch": self.epoch,
            "origin": self.origin,
            "registrar": self.registrar.hex(),
            "authors": {name: key.hex() for name, key in self.authors.items()},
        }
        return json.dumps(facts, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> LedgerId:
        """Read it back; raises ConfigError when it is absent or damaged."""
        try:
            facts = json.loads(path.read_bytes())
            keys = {name: bytes.fromhex(key) for name, key in facts["authors"].items()}
            registrar = bytes.fromhex(facts["registrar"])
            return cls(bytes.fromhex(facts["ledger"]), int(facts["epoch"]), str(facts["origin"]), registrar, keys)
        except FileNotFoundError as missing:
            raise ConfigError(f"{path} is missing: this state directory was never brought up") from missing
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: {error!r}") from error
