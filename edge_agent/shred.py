"""Destroying a secret in a file, on disk when the call returns. Flash memory may keep old blocks all the same: that is why
tokens are short-lived and used once."""

from __future__ import annotations

import os
from pathlib import Path

from bmoe.protocol.files import sync_folder

# More is no file that a first boot's programs copy a token into.
LARGEST = 8 << 20


def shred(path: Path) -> None:
    """Overwrite a file with zeros and remove it; one that is gone already is well. Raises OSError where it stays."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            os.pwrite(handle, bytes(min(os.fstat(handle).st_size, LARGEST)), 0)
            os.fsync(file.fileno())
    finally:
        path.unlink()
    # A name that a power cut brings back would be taken for a damaged token.
    sync_folder(path.parent)


def blank(path: Path, secret: bytes) -> None:
    """Overwrite a secret inside a regular file with as many x, so that whoever reads the file finds its form unchanged.

    Raises OSError where it may still be there.
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
        return
    data = path.read_bytes()
    if secret not in data:
        return
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        at = data.find(secret)
        while at >= 0:
            os.pwrite(handle, b"x" * len(secret), at)
            at = data.find(secret, at + len(secret))
        os.fsync(handle)
    finally:
        os.close(handle)
