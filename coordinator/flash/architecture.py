"""For which processor an image's programs are: by the ELF files in it, whatever file system holds them. Pure.

Files begin at a block of their file system, so an ELF head at a multiple of 1 KiB is the head of a program or library.
Boot files prove less: a 32-bit Raspberry Pi OS boots a 64-bit kernel.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

STRIDE = 1024
_ELF = int.from_bytes(b"\x7fELF", "little")
MACHINES = {0xB7: "aarch64", 0x28: "32-bit ARM", 0x3E: "x86_64", 0x03: "32-bit x86", 0xF3: "RISC-V"}
_PROGRAMS = (2, 3)  # ET_EXEC, ET_DYN; kernel modules are neither


class Programs:
    """Counts programs by processor, chunk after chunk, each of which begins at a multiple of 1 KiB."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes."""
        whole = len(chunk) // STRIDE
        if not whole:
            return
        heads = np.frombuffer(chunk, "<u4", whole * STRIDE // 4).reshape(whole, STRIDE // 4)[:, 0]
        for index in np.flatnonzero(heads == _ELF):
            head = chunk[index * STRIDE : index * STRIDE + 20]
            kind, machine = (int.from_bytes(head[at : at + 2], "little") for at in (16, 18))
            if kind in _PROGRAMS and head[5] == 1:
                self.counts[MACHINES.get(machine, f"ELF machine {machine}")] += 1

    def processor(self, boot: bytes | None) -> str:
        """The processor that most programs are for; by the boot file's first bytes where there is none; or ""."""
        if self.counts:
            return self.counts.most_common(1)[0][0]
        return _of_kernel(boot or b"")


def _of_kernel(head: bytes) -> str:
    if head[56:60] == b"ARM\x64":  # Linux, Documentation/arch/arm64/booting.rst
        return "aarch64"
    if head[0x202:0x206] == b"HdrS":  # Documentation/arch/x86/boot.rst
        return "x86_64"
    return ""
