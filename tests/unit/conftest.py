"""Fixtures that several files of unit tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from inference_helpers import Store

    from bmoe.inference.runner import Runner


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    """An inference runner, its child started."""
    from inference_helpers import MEMORY_MB  # here, so that the other tests need no onnxruntime

    from bmoe.inference.runner import Runner

    async with Runner(memory_mb=MEMORY_MB) as started:
        yield started


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Puts a model's bytes into a file for the runner."""
    from inference_helpers import put

    return partial(put, tmp_path)
