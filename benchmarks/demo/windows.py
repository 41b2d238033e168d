"""The held-out windows of the wearable model, for the processes that ask and that measure."""

from __future__ import annotations

import importlib.util

import numpy as np

from bmoe.protocol.errors import ConfigError
from bmoe.storage.packaged import packaged

MODEL = "wearable"
INPUT, OUTPUT = "window", "probabilities"


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Windows float32 [N, 6, 100] and labels int64 [N] of wearers whom training never saw.

    Raises ConfigError when the recordings are not installed or not the known ones.
    """
    path = packaged("models", MODEL) / "data.py"
    spec = importlib.util.spec_from_file_location("bmoe_demo_windows", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is missing: the demonstration runs in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.held_out()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
