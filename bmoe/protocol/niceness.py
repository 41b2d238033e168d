"""Giving way: a process that may wait leaves the machine to those that answer requests."""

from __future__ import annotations

import contextlib
import os
import time

OOM_SCORE = 300
AUTOGROUP_TRIES, AUTOGROUP_AGAIN_S = 5, 0.12


def give_way(nice: int) -> None:
    """Be as nice as that (0 to 19), with all that we start from now on, in a session of our own.

    Where the kernel puts each session into a group of its own (sched(7), autogroup), a nice value counts within its
    session alone, and the group has one too.
    """
    with contextlib.suppress(PermissionError):  # we lead a session, or a shell's job
        os.setsid()
    make_nice(os.getpid(), nice)


def make_nice(pid: int, nice: int) -> None:
    """Make a process of ours as nice as that, and if it leads a session, its session too; one that has gone is no fault.

    Where memory runs out it goes before those that answer requests.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE))
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, max(nice, os.getpriority(os.PRIO_PROCESS, pid)))
        if os.getsid(pid) != pid:
            return
    for _ in range(AUTOGROUP_TRIES):
        try:
            with open(f"/proc/{pid}/autogroup", "w") as file:
                file.write(str(nice))
            return
        except BlockingIOError:  # the kernel takes ten such wishes a second, of the whole machine
            time.sleep(AUTOGROUP_AGAIN_S)
        except OSError:  # this kernel has no such groups, or the process has gone
            return
