"""The ledger layer: rules without I/O in `rules`, and beside them stream, replica, validator, auditor."""
