"""What an agent is made of: its outbox, its experts, the process that computes, whom it believes; opened in one place."""

from __future__ import annotations

from bmoe.inference.runner import Runner
from bmoe.protocol.tls import mutual_tls
from bmoe.storage.installed import pinned
from edge_agent.admit import Rules
from edge_agent.complain import Complaints
from edge_agent.config import AgentSettings
from edge_agent.experts import Experts
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity
from edge_agent.outbox import Outbox
from edge_agent.policy import release_check
from edge_agent.sign import Stamp
from edge_agent.tally import Tally
from edge_agent.trust import Trust

ANSWERED_S = 60  # beyond the wait for a task's notice, in case a complaint needs the output


class Parts:
    """One device's, for one life of its process. Raises ConfigError where its directory cannot be used."""

    def __init__(self, settings: AgentSettings, identity: Identity) -> None:
        self.settings, self.identity = s, i = settings, identity
        self.outbox = Outbox(
            s.state / "outbox.db", count=s.outbox_count, size=s.outbox_bytes, age_ms=s.outbox_age_s * 1000,
            answered_ms=(s.notice_wait_s + ANSWERED_S) * 1000,
        )  # fmt: skip
        self.fleet = FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key))
        self.trust = Trust(i, self.fleet)
        self.experts = Experts(
            s.state / "experts", self.fleet, i.registrar, i.ledger, file_bytes=s.expert_bytes,
            cache_bytes=s.cache_bytes, check=release_check(i, self.fleet, s.release_assurance),
            keep=lambda: pinned(s.state),
        )  # fmt: skip
        self.runner = Runner(
            memory_mb=s.memory_mb, max_sessions=s.max_sessions, nice=s.nice, threads=s.threads, providers=s.providers
        )
        self.complaints = Complaints(
            size=s.complaint_bytes, per_minute=s.complaints_per_minute, wait_ms=s.notice_wait_s * 1000
        )
        self.tally = Tally()

    def stamp(self) -> Stamp:
        """The author's part of our next message. Raises UnavailableError where the disk takes no further number."""
        i = self.identity
        return Stamp(i.signer, i.name, i.ledger, self.trust.epoch, self.outbox.next_seq)

    def rules(self) -> Rules:
        """What admission measures tasks against now."""
        s, i = self.settings, self.identity
        return Rules(
            i.name, i.ledger, self.trust.epoch, self.trust.coordinators, s.payload_bytes, s.memory_mb,
            s.clock_tolerance_ms,
        )  # fmt: skip

    async def close(self) -> None:
        """End the process that computes, and write what waits."""
        await self.experts.close()
        await self.runner.close()
        await self.outbox.close()
