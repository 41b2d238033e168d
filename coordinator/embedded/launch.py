"""Run as a script between supervisor and child: bind the child's life to the supervisor's, then become the child.

Usage: python -I -S launch.py PARENT_PID PROGRAM ARG...
A separate step rather than a `preexec_fn`, because Python code between fork and exec may deadlock in a threaded parent.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind this process to its parent's life, then become the program that argv names."""
    # SIGKILL and not SIGTERM: a child that hangs in its handler would outlive us, and all it keeps survives a kill.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the supervisor died before its child started")  # the signal is sent only for deaths after prctl
    os.umask(0o077)
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main()
