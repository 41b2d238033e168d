"""Run as `python -m coordinator.embedded.nice N PROGRAM ARG...`: become the program, as nice as N."""

from __future__ import annotations

import os
import sys

from bmoe.protocol.niceness import give_way

if __name__ == "__main__":
    give_way(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
