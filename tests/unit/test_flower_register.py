"""SuperNodes' keys and a SuperLink that is away now and then: nobody is forgotten, nobody who was revoked stays.

flwr's command is stood in for by a script of its form, with a SuperLink of files: what it has, and whether it is away.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from coordinator.embedded.state_dir import private_dir
from coordinator.flower import register
from coordinator.flower.layout import FlowerLayout
from coordinator.flower.register import ask_for, forget, read_nodes, register_all

FLWR = """#!{python}
import json, pathlib, sys
place = pathlib.Path({place!r})
what, argument = sys.argv[2], sys.argv[3]
nodes = [row.split(" ", 2) for row in (place / "nodes").read_text().splitlines()]
def say(**values):
    print(json.dumps(values))
    sys.exit(0 if values["success"] else 1)
if (place / "away").exists():
    say(success=False, **{{"error-message": "The SuperLink cannot be reached"}})
if what == "list":
    say(success=True, nodes=[{{"node-id": number, "status": status}} for number, status, _ in nodes])
if what == "register":
    key = pathlib.Path(argument).read_text()
    if key in [known for *_, known in nodes]:
        say(success=False, **{{"error-message": "Public key already in use."}})
    nodes.append([str(len(nodes) + 1), "registered", key])
if what == "unregister":
    found = [row for row in nodes if row[0] == argument and row[1] == "registered"]
    if not found:
        say(success=False, **{{"error-message": "not found"}})
    found[0][1] = "unregistered"
(place / "nodes").write_text("\\n".join(" ".join(row) for row in nodes))
say(success=True, **{{"node-id": argument if what == "unregister" else len(nodes)}})
"""


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerLayout:
    made = FlowerLayout(tmp_path)
    private_dir(made.keys)
    (tmp_path / "nodes").write_text("")
    program = tmp_path / "flwr"
    program.write_text(FLWR.format(python=sys.executable, place=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(register, "flower_program", lambda name: str(program))
    return made


def known(layout: FlowerLayout) -> dict[str, int]:
    return {device: node.node for device, node in read_nodes(layout).items()}


async def test_a_superlink_that_is_away_is_asked_again(layout: FlowerLayout, tmp_path: Path) -> None:
    ask_for(layout, "pi-1", "key 1")
    (tmp_path / "away").touch()
    assert not await register_all(layout) and known(layout) == {}
    (tmp_path / "away").unlink()
    assert await register_all(layout) and known(layout) == {"pi-1": 1}
    assert ask_for(layout, "pi-1", "key 1") and await register_all(layout), "once is enough"


async def test_who_was_revoked_while_the_superlink_was_away_is_unregistered_all_the_same(
    layout: FlowerLayout, tmp_path: Path
) -> None:
    ask_for(layout, "pi-1", "key 1")
    assert await register_all(layout)
    forget(layout, "pi-1")
    (tmp_path / "away").touch()
    assert not await register_all(layout) and known(layout) == {"pi-1": 1}, "it still could come"
    (tmp_path / "away").unlink()
    assert await register_all(layout) and known(layout) == {}
    assert "1 unregistered" in (tmp_path / "nodes").read_text()


async def test_a_superlink_that_lost_its_database_is_no_dead_end(layout: FlowerLayout, tmp_path: Path) -> None:
    ask_for(layout, "pi-1", "key 1")
    assert await register_all(layout)
    (tmp_path / "nodes").write_text("")
    forget(layout, "pi-1")
    assert await register_all(layout) and known(layout) == {}


async def test_a_device_that_sends_key_after_key_costs_one_a_minute(layout: FlowerLayout) -> None:
    ask_for(layout, "pi-1", "key 1")
    path = layout.keys / "pi-1.pub"
    for number in range(5):
        ask_for(layout, "pi-1", f"other {number}")
    assert path.read_text() == "key 1"
    os.utime(path, (1, 1))
    ask_for(layout, "pi-1", "key 2")
    assert path.read_text() == "key 2"


async def test_one_device_has_one_supernode(layout: FlowerLayout, tmp_path: Path) -> None:
    ask_for(layout, "pi-1", "key 1")
    assert await register_all(layout)
    os.utime(layout.keys / "pi-1.pub", (1, 1))
    ask_for(layout, "pi-1", "key 2")
    assert await register_all(layout) and known(layout) == {"pi-1": 2}
    assert "1 unregistered" in (tmp_path / "nodes").read_text()
