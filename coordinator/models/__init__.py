"""Bring your own model: its manifest written, the model checked, the model published."""
