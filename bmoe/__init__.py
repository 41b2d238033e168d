"""bmoe: verified Mixture-of-Experts inference on edge boards that nobody has to trust."""

__version__ = "0.1.0"
