"""Pure, deterministic rules that every validator and auditor recomputes bit for bit. No I/O, no clock."""
