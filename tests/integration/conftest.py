"""One running fleet that the tests of attacks share: a gateway and four honest agents, real processes all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from live_fleet import LiveFleet


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveFleet]:
    """Started by the first test that asks for it; tests use names of their own and leave the four as they were."""
    from live_fleet import LiveFleet  # here, so that the other tests of this folder need none of it

    from benchmarks.fleet import LocalFleet, specs

    async with LocalFleet(tmp_path_factory.mktemp("fleet"), specs(4)) as local:
        await local.start()
        yield LiveFleet(local)
