"""`bmoe-agent doctor`: what may be wrong with a board, a line for each check. Reads and asks, and changes nothing.

A table of functions; each says of one thing whether it is well, and what to do where it is not. `ok` None: it does not
matter here, or cannot be known.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmoe.inference.runner import child_environment
from bmoe.protocol.errors import BmoeError, ModelError, RefusedError
from bmoe.protocol.tls import mutual_tls
from edge_agent import clock
from edge_agent.certificates import REMEDY, is_due, over, seconds_left
from edge_agent.config import AgentSettings
from edge_agent.enrol import token_file
from edge_agent.fleet import FleetClient
from edge_agent.health import MEMORY_FREE_MB, TEMPERATURE_MC, THROTTLED, Gauge, memory_mb
from edge_agent.identity import Identity, load_identity

PROBE_S = 90
DISK_MB = 200
HOT_C = 85
# A small model of ours is run: a processor that a wheel is not made for may die only there, not at the import.
PROBE = """
import json, sys
import numpy as np
from bmoe.inference import sessions
from bmoe.storage.packaged import packaged
expert = sessions.open_expert((packaged("models", "wearable") / "gate.onnx").read_bytes(), wanted=sys.argv[1:])
shapes = {slot.name: [d if isinstance(d, int) else 1 for d in slot.dims] for slot in expert.inputs}
expert.session.run(None, {slot.name: np.zeros(shapes[slot.name], slot.dtype) for slot in expert.inputs})
print(json.dumps([sessions.onnxruntime.__version__, expert.session.get_providers()]))
"""
UNIT = "bmoe-agent.service"


@dataclass(frozen=True)
class Finding:
    """What one check found; `ok` is None where there is nothing to judge."""

    name: str
    ok: bool | None
    text: str

    def line(self) -> str:
        """For a reader."""
        return f"{ {True: 'ok', False: 'FAIL', None: '-'}[self.ok]:<5}{self.name:<12} {self.text}"

    def facts(self) -> dict[str, str | bool | None]:
        """For a program."""
        return {"check": self.name, "ok": self.ok, "text": self.text}


@dataclass(frozen=True)
class Patient:
    """What the checks look at."""

    settings: AgentSettings
    identity: Identity | None
    stranger: str = ""  # why there is no identity
    root: Path = Path("/")


def examine(settings: AgentSettings, root: Path = Path("/")) -> list[Finding]:
    """All checks in their order; one that fails in an unforeseen way says so and the others go on."""
    identity, stranger = None, ""
    try:
        identity = load_identity(settings.state)
    except BmoeError as error:
        stranger = str(error)
    patient = Patient(settings, identity, stranger, root)
    return [_one(name, check, patient) for name, check in CHECKS.items()]


def _one(name: str, check: Callable[[Patient], tuple[bool | None, str]], patient: Patient) -> Finding:
    try:
        ok, text = check(patient)
    except (BmoeError, OSError) as error:
        ok, text = False, str(error)
    except Exception as error:  # a check must not cost the others
        ok, text = False, f"{type(error).__name__}: {error}"
    return Finding(name, ok, " ".join(text.split()))


def _clock(p: Patient) -> tuple[bool | None, str]:
    if p.identity is None:
        clock.check_floor(p.settings.state)
        return None, f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC, not compared: no gateway is known yet"
    try:
        off = clock.now_s() - clock.gateway_s(p.identity.url, p.identity.ca)
    except BmoeError:
        clock.check_floor(p.settings.state)
        return None, "later than what has certainly passed; the gateway cannot be asked"
    if abs(off) > p.settings.clock_tolerance_ms / 1000 + 1:
        return False, f"{off:+.0f} s from the gateway's: set it, and keep it set (systemd-timesyncd, chrony)"
    return True, f"within {abs(off):.0f} s of the gateway's"


def _disk(p: Patient) -> tuple[bool | None, str]:
    state = p.settings.state
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    free = shutil.disk_usage(there).free >> 20
    if there == state and not os.access(state, os.W_OK):
        return False, f"{state} is not writable by uid {os.geteuid()}"
    return free >= DISK_MB, f"{free} MB free at {there}" + (
        "" if free >= DISK_MB else f": make room, {DISK_MB} MB at least"
    )


def _enrolled(p: Patient) -> tuple[bool | None, str]:
    if p.identity is not None:
        return True, f"as {p.identity.name} of {p.identity.owner}, at {p.identity.url}"
    if token_file(p.settings.state).exists():
        return None, "a token waits for network and time; the log says what it waits for"
    return False, p.stranger


def _gateway(p: Patient) -> tuple[bool | None, str]:
    if p.identity is None:
        return None, "no gateway is known yet"
    i = p.identity
    started = time.monotonic()
    FleetClient(i.url, lambda: mutual_tls(i.ca), timeout_s=5).get("/v1/ca")
    return True, f"{i.url} answers in {1000 * (time.monotonic() - started):.0f} ms, under the CA that was pinned"


def _membership(p: Patient) -> tuple[bool | None, str]:
    if p.identity is None:
        return None, "not enrolled"
    i = p.identity
    try:
        FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key), timeout_s=5).get_json("/v1/members")
    except RefusedError as error:
        return False, f"the gateway refuses this board: {error}; join anew: bmoe-agent join TOKEN --force"
    return True, "the gateway takes this board's certificate"


def _certificate(p: Patient) -> tuple[bool | None, str]:
    if p.identity is None:
        return None, "not enrolled"
    due = is_due(p.identity.certificate.read_bytes())
    if ended := over(p.identity.certificate):
        return False, f"expired {ended}: {REMEDY}"
    days = seconds_left(p.identity.certificate) / 86400
    return True, f"{days:.1f} days left" + (", renewal is due" if due else "")


def _onnxruntime(p: Patient) -> tuple[bool | None, str]:
    version, used = _probe(p.settings.providers)
    missing = [name for name in p.settings.providers if name not in used]
    text = f"{version} ran a model on {used[0]}"
    return not missing, text + (f"; not to be had here: {', '.join(missing)}" if missing else "")


def _probe(providers: Sequence[str]) -> tuple[str, list[str]]:
    """Run a model in a process of its own: one that is not made for this processor dies by a signal."""
    words = [sys.executable, "-c", PROBE, *providers]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PROBE_S, env=child_environment(), cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"onnxruntime did not run a small model within {PROBE_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ModelError(f"onnxruntime dies by {name}: this build is not for this processor, install another version")
    if done.returncode > 0:
        raise ModelError(f"onnxruntime cannot be used: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    version, used = json.loads(done.stdout.splitlines()[-1])
    return version, used


def _temperature(p: Patient) -> tuple[bool | None, str]:
    found = Gauge(p.root, p.settings.temperature_file).read()
    if TEMPERATURE_MC not in found:
        return None, f"{p.settings.temperature_file} cannot be read"
    degrees, bits = found[TEMPERATURE_MC] / 1000, found.get(THROTTLED, 0)
    text = f"{degrees:.0f} C" + (
        f", throttled (firmware bits {bits:#x}): check power and cooling" if bits & 0xF else ""
    )
    return degrees < HOT_C and not bits & 0xF, text


def _memory(p: Patient) -> tuple[bool | None, str]:
    free, total = Gauge(p.root).read().get(MEMORY_FREE_MB, 0), memory_mb(p.root)
    wanted = p.settings.memory_mb
    return wanted <= total, f"{free} of {total} MB free; experts may use {wanted} (memory_mb)"


def _watchdog(p: Patient) -> tuple[bool | None, str]:
    if not (p.root / "dev/watchdog0").exists():
        return None, "no device /dev/watchdog0"
    state = p.root / "sys/class/watchdog/watchdog0/state"
    if not state.exists():
        return None, "this kernel does not tell whether /dev/watchdog0 is in use"
    active = state.read_text().strip() == "active"
    return active, "the board restarts when it hangs" if active else "not in use: set RuntimeWatchdogSec in systemd"


def _service(p: Patient) -> tuple[bool | None, str]:
    if not os.path.isdir("/run/systemd/system"):
        return None, "systemd does not run here"
    words = ["systemctl", "show", UNIT, "-p", "LoadState,ActiveState,UnitFileState,NRestarts,StatusText"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if facts.get("LoadState") != "loaded":
        return None, "not installed: bmoe-agent install makes it start at boot"
    well = facts.get("ActiveState") == "active"
    text = f"{facts.get('ActiveState')}, {facts.get('UnitFileState')}, restarted {facts.get('NRestarts')} times"
    return well, f"{text}; {facts.get('StatusText') or 'it says nothing'}"


CHECKS: dict[str, Callable[[Patient], tuple[bool | None, str]]] = {
    "clock": _clock,
    "disk": _disk,
    "enrolment": _enrolled,
    "gateway": _gateway,
    "membership": _membership,
    "certificate": _certificate,
    "onnxruntime": _onnxruntime,
    "temperature": _temperature,
    "memory": _memory,
    "watchdog": _watchdog,
    "service": _service,
}
