"""Run as `python -m coordinator.embedded.nice N PROGRAM ARG...`: become the program, N steps nicer than we are."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.nice(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
