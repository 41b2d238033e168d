"""What every receipt is checked by, whatever it is of: who cosigned its checkpoint, and errors that name the step.

Imports no numpy, so that a board's own process can check the receipt of a release.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bmoe.ledger.rules.checkpoint import verify_cosignature
from bmoe.ledger.rules.receipt_format import Receipt
from bmoe.ledger.rules.trust import Trust
from bmoe.protocol.errors import BmoeError, ConfigError, ProofError

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def check_cosignatures(receipt: Receipt, trust: Trust) -> tuple[tuple[str, int], ...]:
    """(validator, POSIX seconds) of each trusted validator that cosigned; raises ProofError below the quorum.

    A line of a key that the policy does not name is ignored, as C2SP asks; one of a named key must verify.
    """
    if receipt.checkpoint.origin != trust.origin:
        raise ProofError(f"the checkpoint is of {receipt.checkpoint.origin!a}, the policy trusts {trust.origin!a}")
    present = {(s.name, s.key_id) for s in receipt.note.signatures}
    keys = [key for key in trust.validators if (key.name, key.key_id) in present]
    cosigned = tuple((key.name, verify_cosignature(receipt.note, key)) for key in keys)
    if len(cosigned) < trust.quorum:
        names = ", ".join(name for name, _ in cosigned) or "nobody"
        raise ProofError(f"a quorum of {trust.quorum} validators must have cosigned, found {len(cosigned)}: {names}")
    return cosigned


@contextlib.contextmanager
def step(number: int, name: str) -> Iterator[None]:
    """Name the step in whatever it raises: a ProofError, for malformed content as well."""
    try:
        yield
    except ConfigError:
        raise
    except BmoeError as error:
        raise ProofError(f"step {number} ({name}): {error}") from error
    except MALFORMED as error:
        raise ProofError(f"step {number} ({name}): malformed content ({type(error).__name__})") from error
