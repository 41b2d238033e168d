"""A bad link between this machine and a network namespace of its own: packets are late, lost, or all of a direction cut.

Two TUN devices and a thread that carries packets from one to the other, so that TCP meets real loss. Linux, and root.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from types import TracebackType

from certs import FAR_END

NEAR_END = "10.231.77.2"
TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001
MTU = 1500


def why_not() -> str:
    """Why there can be no such wire here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        subprocess.run(["ip", "netns", "list"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no TUN device or no ip(8): {error}"
    return ""


class LossyWire:
    """`with LossyWire(loss=0.05, delay_s=0.15) as wire:` a command in `wire.enter` reaches us at FAR_END, and badly.

    `delay_s` is that of one direction; `cut` names directions in which everything is lost: "up" is from the near end to
    us, "down" the other. `seed` draws the same losses again.
    """

    def __init__(self, *, loss: float, delay_s: float, seed: int = 1) -> None:
        self.loss, self.delay_s = loss, delay_s
        self.cut: set[str] = set()
        self.name = f"bmoe-{os.getpid()}"
        self.lost = self.carried = 0
        self._random = random.Random(seed)
        self._ended = threading.Event()

    @property
    def enter(self) -> list[str]:
        """What stands before a command that is to run at the near end."""
        return ["ip", "netns", "exec", self.name]

    def __enter__(self) -> LossyWire:
        far, near = (f"{end}-{os.getpid()}" for end in ("far", "near"))  # an interface's name has 15 characters
        self._ends = [_tun(far), _tun(near)]
        try:
            for line in (
                f"ip netns add {self.name}",
                f"ip addr add {FAR_END} peer {NEAR_END} dev {far}",
                f"ip link set {far} up",
                f"ip link set {near} netns {self.name}",
                f"ip -n {self.name} addr add {NEAR_END} peer {FAR_END} dev {near}",
                f"ip -n {self.name} link set {near} up",
                f"ip -n {self.name} link set lo up",
            ):
                subprocess.run(line.split(), check=True)
        except BaseException:
            self._take_down()
            raise
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._take_down()

    def _take_down(self) -> None:
        for end in self._ends:
            os.close(end)
        subprocess.run(["ip", "netns", "del", self.name], check=False)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self._ended.is_set():
            until = waiting[0][0] - time.monotonic() if waiting else 0.05
            ready, _, _ = select.select(self._ends, [], [], min(max(until, 0), 0.05))
            for end in ready:
                packet = os.read(end, MTU + 100)
                direction = "down" if end == self._ends[0] else "up"
                if direction in self.cut or self._random.random() < self.loss:
                    self.lost += 1
                    continue
                self.carried += 1
                other = self._ends[1 - self._ends.index(end)]
                heapq.heappush(waiting, (time.monotonic() + self.delay_s, self.carried, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(waiting)
                os.write(other, packet)


def _tun(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    return handle
