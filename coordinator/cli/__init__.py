"""The command `bmoe`: for gateways, operators and auditors.

`bmoe audit` runs with the base installation alone; everything else needs the `gateway` extra.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point. Errors of ours are one line on stderr: exit 2 for bad input or settings, 1 for the rest."""
    if sys.argv[1:2] == ["audit"]:
        from bmoe.ledger.audit import main as audit

        return audit(sys.argv[2:])
    try:
        from coordinator.cli.commands import run
    except ModuleNotFoundError as missing:
        print(
            f"bmoe: {missing.name} is not installed; this command needs: pip install 'bmoe[gateway]'", file=sys.stderr
        )
        return 2
    return run()
