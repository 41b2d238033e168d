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

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from coordinator.emulate.board import EmulatedBoard
    from coordinator.emulate.fleet import Fleet


@pytest.fixture(scope="session")
def emulated_board(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EmulatedBoard]:
    """`emulated_board("rpi4")`: a board, made once a session. `board.run(file, inputs)` runs an ONNX file on it."""
    with _one_line("emulated board"):
        from coordinator.emulate.workshop import Workshop

        workshop = Workshop(tmp_path_factory.mktemp("boards"))

    def board(name: str) -> EmulatedBoard:
        with _one_line("emulated board"):
            return workshop.board(name)

    return board


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A gateway of the test's own, as yet without agents."""
    with _one_line("fleet"):
        from coordinator.emulate.fleet import Fleet

        running = Fleet(tmp_path / "fleet")
        running.start()
    try:
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What is missing, or an error of ours, fails the test without a traceback through us."""
    try:
        yield
    except ModuleNotFoundError as missing:
        pytest.fail(f"no {what}: {missing.name} is not installed; pip install 'bmoe[gateway]'", pytrace=False)
    except Exception as error:
        from bmoe.protocol.errors import BmoeError

        if not isinstance(error, BmoeError):
            raise
        pytest.fail(f"no {what}: {error}", pytrace=False)
