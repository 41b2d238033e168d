"""Emulated boards: aarch64 agents under qemu-user with a board's identity, for our tests and for users'."""
