"""The demonstration: a fleet of which some lie, asked without and with verification. `python -m benchmarks.demo`."""
