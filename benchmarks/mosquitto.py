"""The Mosquitto programs: installed ones, or those that `make mosquitto` unpacked into the checkout without root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.processes import ROOT
from bmoe.protocol.errors import ConfigError

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
