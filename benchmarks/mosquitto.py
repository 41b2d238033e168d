"""The Mosquitto programs: installed ones, or those that `make mosquitto` unpacked into the checkout without root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.processes import ROOT
from bmoe.protocol.errors import ConfigError

# Which broker the fleets of tests and benchmarks have, where nothing else is said.
CHOICE = "BMOE_TEST_BROKER"
FETCHED = ROOT / ".mosquitto"
FOLDERS = ("/usr/sbin", "/usr/local/sbin", str(FETCHED / "usr/sbin"), str(FETCHED / "usr/bin"))


def find(name: str) -> tuple[str, dict[str, str]]:
    """Path of `mosquitto`, `mosquitto_pub`, ... and the variables that it needs; raises ConfigError where it is not."""
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(FOLDERS))
    if path is None:
        raise ConfigError(f"{name} is neither installed nor in {FETCHED}: `make mosquitto` fetches it on Debian")
    if not Path(path).is_relative_to(FETCHED):
        return path, {}
    folders = sorted({str(library.parent) for library in FETCHED.glob("**/lib/*/lib*.so.*")})
    return path, {"LD_LIBRARY_PATH": os.pathsep.join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")}


def chosen() -> str:
    """ "nats" or "mosquitto", as BMOE_TEST_BROKER says."""
    return os.environ.get(CHOICE, "nats")


def settings(broker: str) -> dict[str, str]:
    """What the environment of `bmoe up` must hold for this broker; raises ConfigError where its program is missing."""
    if broker != "mosquitto":
        return {"BMOE_BROKER": broker}
    path, variables = find("mosquitto")
    return {"BMOE_BROKER": broker, "BMOE_MOSQUITTO": path, **variables}
