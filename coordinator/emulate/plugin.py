"""pytest plugin: emulated boards and throwaway fleets as fixtures, for the tests of anyone who has bmoe installed.

Loaded into every pytest run of the environment, it imports nothing of ours until a fixture is asked for.

    def test_my_expert_on_a_pi(fleet, emulated_board):
        fleet.publish(Path("my-model"))
        fleet.add("pi", emulated_board("rpi4"))
        fleet.add("native")
        fleet.online()
        answer = fleet.client().infer("my-model", {"x": x}, policy="full")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from coordinator.emulate.board import EmulatedBoard
    from coordinator.emulate.fleet import Fleet

NOT_INSTALLED = "{} is not installed; this fixture needs: pip install 'bmoe[gateway]'"


@pytest.fixture(scope="session")
def emulated_board(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EmulatedBoard]:
    """`emulated_board("rpi4")`: a board, made once a session. `board.run(file, inputs)` runs an ONNX file on it."""
    from bmoe.protocol.errors import BmoeError

    try:
        from coordinator.emulate.workshop import Workshop
    except ModuleNotFoundError as missing:
        pytest.fail(NOT_INSTALLED.format(missing.name), pytrace=False)

    workshop = Workshop(tmp_path_factory.mktemp("boards"))

    def board(name: str) -> EmulatedBoard:
        try:
            return workshop.board(name)
        except BmoeError as error:
            pytest.fail(f"no emulated board: {error}", pytrace=False)

    return board


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A gateway of the test's own, as yet without agents."""
    from bmoe.protocol.errors import BmoeError

    try:
        from coordinator.emulate.fleet import Fleet
    except ModuleNotFoundError as missing:
        pytest.fail(NOT_INSTALLED.format(missing.name), pytrace=False)

    running = Fleet(tmp_path / "fleet")
    try:
        running.start()
    except BmoeError as error:
        pytest.fail(f"no fleet: {error}", pytrace=False)
    try:
        yield running
    finally:
        running.close()
