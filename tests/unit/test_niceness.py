"""What may wait gives way, also where the kernel groups processes by session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bmoe.protocol.niceness import make_nice

PRINT = "import os; print(os.getpriority(os.PRIO_PROCESS, 0), os.getsid(0) == os.getpid(), end=' ')"
GROUP = "import os; p = '/proc/self/autogroup'; print(open(p).read() if os.path.exists(p) else 'nice 10')"
CODE = f"from bmoe.protocol.niceness import give_way; give_way(10); {PRINT}; {GROUP}"


def test_a_process_that_gives_way_leads_a_nice_session_and_its_children_are_as_nice() -> None:
    child = f"{CODE}; import subprocess, sys; subprocess.run([sys.executable, '-c', {PRINT!r}])"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("10 True") and "nice 10" in done.stdout and done.stdout.endswith("10 False ")


def test_a_process_is_made_nice_by_who_started_it_and_our_own_session_is_left_alone() -> None:
    mine = Path("/proc/self/autogroup")
    before = mine.read_text() if mine.exists() else ""
    for own in (True, False):
        with subprocess.Popen(["sleep", "60"], start_new_session=own) as child:
            make_nice(child.pid, 10)
            group = Path(f"/proc/{child.pid}/autogroup")
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == 10
            assert not own or not group.exists() or "nice 10" in group.read_text()
            child.kill()
    assert (mine.read_text() if mine.exists() else "") == before


def test_a_process_that_has_gone_is_no_fault() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    make_nice(gone.pid, 10)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
