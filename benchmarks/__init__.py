"""Benchmarks, the demonstration, and the harness of real processes that they and the tests share. Not installed."""
