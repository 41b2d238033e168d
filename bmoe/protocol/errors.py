"""The whole error tree: who was at fault, and the facts.

BmoeError
+-- ConfigError            the operator's settings or files are wrong
+-- InputError             the bytes or values someone sent us are wrong
|   +-- EncodingError      not the one deterministic CBOR spelling, or over a cap
|   +-- EnvelopeError      not a COSE_Sign1 we accept, or its signature is bad
|   +-- MessageError       a well-signed message whose fields are not allowed
|   +-- ProofError         a Merkle proof, note, checkpoint or receipt that does not verify
|   +-- ManifestError      a model manifest that is not true or not allowed
|   +-- ModelError         a model file that cannot be loaded or served
|   +-- ImageError         a disk image that is damaged, or not for this board
|   +-- UnknownError       it names something that is not here
|   `-- LimitError         it is larger than what is taken
+-- RefusedError           well-formed, but the peer may not do this (identity, standing, replay)
|   +-- AuthenticationError  nobody knows who asks
|   `-- QuotaError         the peer may do this, but not so much of it: later
+-- InferenceError         an expert failed on a valid task (crash, time, memory)
+-- LedgerError            the ledger engine or a replica failed
|   `-- LedgerForkError    a stream position changed or is missing: evidence, never healed silently
`-- UnavailableError       something we need is not there now; trying later may help
"""

from __future__ import annotations


class BmoeError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(BmoeError):
    """The operator's settings or files are wrong."""


class InputError(BmoeError):
    """The bytes or values someone sent us are wrong."""


class EncodingError(InputError):
    """Bytes that are not the one deterministic spelling, or exceed a cap."""


class EnvelopeError(InputError):
    """Bytes that are not an envelope we accept, or whose signature does not verify."""


class MessageError(InputError):
    """A well-signed message whose fields are missing, of the wrong type or out of range."""


class ProofError(InputError):
    """A Merkle proof, signed note, checkpoint or receipt that does not verify."""


class ManifestError(InputError):
    """A model manifest that is not true or not allowed."""


class ModelError(InputError):
    """A model file that cannot be loaded or served."""


class ImageError(InputError):
    """A disk image that is damaged, cut short, or not for this board."""


class UnknownError(InputError):
    """A request that names something that is not here."""


class LimitError(InputError):
    """A request larger than what is taken."""


class RefusedError(BmoeError):
    """A well-formed request that the peer may not make."""


class AuthenticationError(RefusedError):
    """A request by nobody that we know."""


class QuotaError(RefusedError):
    """A request beyond what its tenant may have; `retry_s` is how many seconds to wait."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class InferenceError(BmoeError):
    """An expert failed on a valid task: it crashed, ran out of time or memory, or raised."""


class LedgerError(BmoeError):
    """The ledger engine or a replica of it failed."""


class LedgerForkError(LedgerError):
    """A stream position whose content changed or is missing."""


class UnavailableError(BmoeError):
    """Something needed is not there now; trying again later may help."""
