"""A board's source as a process: `bmoe-agent source`, beside `bmoe-agent run` or, where nothing is computed, without it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping

from bmoe.inference.runner import Runner
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.tls import mutual_tls
from bmoe.storage.installed import pinned
from edge_agent import certificates, logs
from edge_agent.config import AgentSettings
from edge_agent.experts import Experts
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, load_identity
from edge_agent.local import Local
from edge_agent.models import Models
from edge_agent.policy import release_check
from edge_agent.requester import SESSION, Requester
from edge_agent.service import only_one
from edge_agent.source import Asker, Source
from edge_agent.submissions import Submissions


async def serve_source(settings: AgentSettings, model: str, source: Source, parameters: Mapping[str, str]) -> None:
    """Run a source until a signal, or until it has no more requests and all of them are verified.

    Raises ConfigError when this device has not joined or another process serves a source of it.
    """
    logs.set_up(settings.log_level, settings.log_format)
    identity = load_identity(settings.state)
    with only_one(settings.state, "source.lock", "bmoe-agent source"):
        work = asyncio.ensure_future(_serve(settings, identity, model, source, parameters))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _serve(
    settings: AgentSettings, identity: Identity, model: str, source: Source, parameters: Mapping[str, str]
) -> None:
    s, i = settings, identity
    folder = s.state / "source"
    fleet = FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key))
    # A folder of its own: two processes must not make room in one.
    experts = Experts(
        folder / "experts",
        fleet,
        i.registrar,
        i.ledger,
        file_bytes=s.expert_bytes,
        cache_bytes=s.cache_bytes,
        check=release_check(i, fleet, s.release_assurance),
        keep=lambda: pinned(s.state),
    )
    submissions = Submissions(folder / "submissions.db", count=s.source_queue_count, size=s.source_queue_bytes)
    requester = Requester(i, s.keepalive_s)
    runner = Runner(
        memory_mb=s.memory_mb, max_sessions=s.max_sessions, nice=s.nice, threads=s.threads, providers=s.providers
    )
    local = Local(experts, runner) if s.source_local else None
    asker = Asker(
        model,
        Models(folder, fleet, experts, i.registrar, i.ledger),
        requester,
        submissions,
        local,
        parameters,
        s.source_reply_s,
    )
    renewing = asyncio.ensure_future(certificates.keep(i, fleet, ("", SESSION)))
    connecting = asyncio.ensure_future(_connect(i, fleet, requester))
    try:
        with contextlib.suppress(UnavailableError):  # a first request that comes before the link is no lost one
            await requester.link.wait_up(s.source_reply_s)
        await asker.run(source)
    finally:
        renewing.cancel()
        connecting.cancel()
        await requester.link.stop()
        await experts.close()
        await runner.close()
        await submissions.close()


async def _connect(identity: Identity, fleet: FleetClient, requester: Requester) -> None:
    await certificates.wait_for(identity, fleet, SESSION)
    await requester.link.start()
