"""Fixtures that several files of unit tests share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from inference_helpers import Store
    from release_site import Site

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


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """No waiting for the disk: what SIGKILL leaves behind is the same, and only a power cut would tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site that has released nothing yet."""
    from release_site import Site

    return Site(tmp_path)


@pytest.fixture
def installed(site: Site) -> Site:
    """A site whose board has version 1 of ada's model."""
    site.release(site.model(1))
    site.update(1)
    assert site.installed() == 1
    return site
