"""The benchmark: what verification costs, measured on real processes beside the same path without it."""
