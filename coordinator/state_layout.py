"""Where everything lies under the one state directory of a gateway."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bmoe.ledger.rules.trust import Trust, parse_trust
from bmoe.protocol.errors import ConfigError

# 0 was never released: verdicts without a tenant.
STATE_FORMAT = 1


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
    def trust(self) -> Path:
        """Which ledger this is; also the policy file an auditor is given: validators, quorum, registrar key."""
        return self.root / "trust.json"

    @property
    def signing_key(self) -> Path:
        """The coordinator's Ed25519 key."""
        return self.root / "coordinator" / "coordinator.key"

    @property
    def journal(self) -> Path:
        """Requests in work and promises not yet kept."""
        return self.root / "coordinator" / "journal.db"

    @property
    def fleet(self) -> Path:
        """The coordinator's view of the fleet, rebuilt from the ledger at will."""
        return self.root / "coordinator" / "fleet.json"

    @property
    def api_tokens(self) -> Path:
        """The API tokens, as digests, with what each may do."""
        return self.root / "coordinator" / "api_tokens.json"

    @property
    def evidence(self) -> Path:
        """Inputs and large outputs, for re-execution."""
        return self.root / "evidence" / "evidence.db"

    @property
    def ledger(self) -> Path:
        """The ledger engine's folder."""
        return self.root / "ledger"

    @property
    def blobs(self) -> Path:
        """ONNX files by SHA-256."""
        return self.root / "blobs"

    @property
    def repository(self) -> Path:
        """The signed repository of releases, unless the setting `repository` puts it elsewhere."""
        return self.root / "repository"

    @property
    def repository_keys(self) -> Path:
        """The keys that sign the repository's metadata: the registrar's alone."""
        return self.identity / "repository"

    @property
    def rollouts(self) -> Path:
        """Plans of rollouts, and what only their driver needs to know; where they stand the ledger says."""
        return self.root / "coordinator" / "rollouts.json"

    @property
    def flower(self) -> Path:
        """The SuperLink's folder, made by the first rollout."""
        return self.root / "flower"

    @property
    def ports(self) -> Path:
        """The ports in use, remembered."""
        return self.root / "ports.json"

    @property
    def reach(self) -> Path:
        """Which addresses this machine's own tools dial; written at every start."""
        return self.root / "reach.json"

    def dial(self, name: str) -> str:
        """The address to dial for "host" (fleet HTTPS, broker) or "api_host"; loopback where nothing is said."""
        try:
            return str(json.loads(self.reach.read_bytes())[name])
        except (FileNotFoundError, KeyError):
            return "127.0.0.1"
        except (OSError, ValueError, TypeError, IndexError, RecursionError) as error:
            raise ConfigError(f"{self.reach} is damaged: bring the gateway up again to write it anew") from error

    def api_tls(self) -> bool:
        """Whether the API that was last brought up speaks TLS."""
        try:
            return self.dial("api_scheme") == "https"
        except ConfigError:
            return False

    def figures(self, name: str) -> Path:
        """The figures that another of the gateway's processes hands to the coordinator."""
        return self.root / "figures" / f"{name}.json"

    def validator(self, name: str) -> Path:
        """A validator's folder."""
        return self.root / name

    def logs(self) -> Path:
        """Where our processes log."""
        return self.root / "logs"

    def load_trust(self) -> Trust:
        """Which ledger this is and whom everyone believes; raises ConfigError when it is absent or damaged."""
        try:
            return parse_trust(self.trust.read_bytes())
        except FileNotFoundError as missing:
            raise ConfigError(f"{self.trust} is missing: bring the gateway up first (bmoe up)") from missing
