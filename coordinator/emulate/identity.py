"""What a board tells of itself in /proc and /sys, made from its profile: pure, paths to bytes."""

from __future__ import annotations

from coordinator.boards import Board

SERIAL = "10000000deadbeef"
FREE_SHARE = 0.75  # of a board that has just started


def identity_files(board: Board) -> dict[str, bytes]:
    """Relative paths and contents of what the kernel of such a board shows.

    /proc/cpuinfo: arch/arm64/kernel/cpuinfo.c of Linux; processor ranges: Documentation/admin-guide/cputopology.rst;
    the device tree's properties: strings that end with NUL (Devicetree Specification 2.2.4).
    """
    cores = board.cpuinfo.cores
    files = {"proc/cpuinfo": _cpuinfo(board).encode(), "proc/meminfo": _meminfo(board).encode()}
    for name in ("possible", "present", "online"):
        files[f"sys/devices/system/cpu/{name}"] = f"0-{cores - 1}\n".encode()
    for core in range(cores):
        topology = f"sys/devices/system/cpu/cpu{core}/topology"
        files[f"{topology}/physical_package_id"] = b"0\n"
        files[f"{topology}/core_id"] = f"{core}\n".encode()
        for name in ("core_siblings_list", "package_cpus_list"):
            files[f"{topology}/{name}"] = f"0-{cores - 1}\n".encode()
    properties = {
        "model": board.device_tree.model.encode() + b"\0",
        "compatible": b"".join(name.encode() + b"\0" for name in board.device_tree.compatible),
        "serial-number": SERIAL.encode() + b"\0",
    }
    for tree in ("sys/firmware/devicetree/base", "proc/device-tree"):
        files |= {f"{tree}/{name}": value for name, value in properties.items() if len(value) > 1}
    return files


def _cpuinfo(board: Board) -> str:
    info = board.cpuinfo
    core = (
        "processor\t: {0}\n"
        "BogoMIPS\t: 108.00\n"
        f"Features\t: {' '.join(info.features)}\n"
        f"CPU implementer\t: {info.implementer}\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: {info.variant}\n"
        f"CPU part\t: {info.part}\n"
        f"CPU revision\t: {info.revision}\n\n"
    )
    # These lines are of the kernels of Raspberry Pi OS; a Jetson's has none of them.
    tail = (("Revision", info.board_revision), ("Serial", SERIAL), ("Model", board.device_tree.model))
    return "".join(core.format(number) for number in range(info.cores)) + (
        "".join(f"{name}\t: {value}\n" for name, value in tail) if info.board_revision else ""
    )


def _meminfo(board: Board) -> str:
    total = board.memory_mb * 1024
    free = int(total * FREE_SHARE)
    return f"MemTotal:       {total:>8} kB\nMemFree:        {free:>8} kB\nMemAvailable:   {free:>8} kB\n"
