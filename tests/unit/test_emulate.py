"""Emulated boards without emulation: what a board tells of itself, what is refused, what counts as drift."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bmoe.protocol.errors import ConfigError, InputError, ManifestError
from bmoe.storage.packaged import packaged
from coordinator.boards import boards, load_board
from coordinator.cli.commands import run
from coordinator.emulate.board import copy_agent, emulated_profile, lay_out
from coordinator.emulate.cache import CACHE
from coordinator.emulate.compute import compute
from coordinator.emulate.drift import compare
from coordinator.emulate.fleet import Fleet
from coordinator.emulate.identity import identity_files
from coordinator.emulate.sysroot import Sysroot
from coordinator.emulate.trial_run import measure


def test_a_fleet_keeps_the_names_of_its_own_files(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.agents["pi"] = ()
    for name in ("gateway", "state", "models", "pi"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            fleet.add(name)
    with pytest.raises(ConfigError, match="is no folder"):
        fleet.publish(tmp_path / "none")


def test_what_cannot_be_tried_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that nothing may be put into stays untouched."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    model = packaged("models", "wearable")
    for words, said in (
        (["--board", "rpi4", "--board", "rpi9", "--model", str(model)], "there is no board 'rpi9'"),
        (["--board", "rpi4", "--model", str(tmp_path)], "model.json"),
        (["--board", "rpi4", "--model", str(model), "--keep", str(tmp_path)], "--keep wants a new folder"),
        (["--board", "rpi4", "--model", str(model), "--inputs", str(tmp_path / "none.npz")], "cannot be read"),
    ):
        monkeypatch.setattr(sys, "argv", ["bmoe", "emulate", *words])
        assert run() == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", [name for name in boards() if load_board(name).arch == "aarch64"])
def test_a_board_tells_what_its_profile_says(name: str) -> None:
    board = load_board(name)
    files = identity_files(board)
    cpuinfo = files["proc/cpuinfo"].decode()
    assert cpuinfo.count("processor\t:") == board.cpuinfo.cores
    assert f"CPU part\t: {board.cpuinfo.part}\n" in cpuinfo and " ".join(board.cpuinfo.features) in cpuinfo
    assert files["proc/device-tree/model"] == board.device_tree.model.encode() + b"\0"
    assert files["sys/devices/system/cpu/possible"] == f"0-{board.cpuinfo.cores - 1}\n".encode()
    assert f"MemTotal:       {board.memory_mb * 1024:>8} kB" in files["proc/meminfo"].decode()


def test_a_board_of_this_kind_of_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="generic-x86-64 cannot be emulated"):
        emulated_profile("generic-x86-64")


def test_the_python_of_a_board_names_itself(tmp_path: Path) -> None:
    """What the agent starts as its own interpreter is the script again, paths with spaces and quotes or not."""
    shared = Sysroot(tmp_path / "it's a root", "3.11")
    board = lay_out(load_board("rpi3"), shared, tmp_path / "a board", code=tmp_path)
    shared.folder.mkdir()
    shared.qemu.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" "$PYTHONNOUSERSITE$PYTHONUSERBASE"\n')
    shared.qemu.chmod(0o755)
    done = subprocess.run(
        [board.python, "-c", "a b"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONUSERBASE": "/packages/for/x86"},
    )  # fmt: skip
    *said, own_packages = done.stdout.splitlines()
    assert own_packages == "1"
    assert said[said.index("-0") + 1] == str(board.python)
    assert said[:2] == ["-cpu", "cortex-a53"] and said[-2:] == ["-c", "a b"]


def test_a_board_gets_the_agent_and_nothing_of_the_gateway(tmp_path: Path) -> None:
    copy_agent(tmp_path / "code", Sysroot(tmp_path, "0.0"))
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["bmoe", "edge_agent"]
    assert (tmp_path / "code" / "bmoe" / "inference" / "worker.py").is_file()


def test_whoever_interrupts_does_not_wait_for_the_board(tmp_path: Path) -> None:
    """Ctrl-C while an emulated board computes, which may take it minutes."""
    slow, began = tmp_path / "python", tmp_path / "began"
    slow.write_text(f"#!/bin/sh\necho $$ > {began}.half; mv {began}.half {began}\nexec sleep 600\n")
    slow.chmod(0o755)
    file = packaged("models", "wearable") / "gate.onnx"
    call = (
        "import signal; from pathlib import Path; from coordinator.emulate.compute import compute\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by who was started in the background
        f"compute({str(slow)!r}, [(Path({str(file)!r}), {{}})])"
    )
    said = tmp_path / "said"  # no pipe: the board's process holds it open, too
    with (
        said.open("wb") as file_of_words,
        subprocess.Popen([sys.executable, "-c", call], stderr=file_of_words) as child,
    ):
        deadline = time.monotonic() + 20
        while not began.exists():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=10)
        finally:
            child.kill()
            os.kill(int(began.read_text()), signal.SIGKILL)
    assert "KeyboardInterrupt" in said.read_text()


def test_a_file_that_is_not_the_manifests_is_not_measured(tmp_path: Path) -> None:
    folder = shutil.copytree(packaged("models", "wearable"), tmp_path / "model")
    (folder / "gate.onnx").write_bytes((folder / "expert-0.onnx").read_bytes())
    with pytest.raises(ManifestError, match=r"gate\.onnx"):
        measure(folder, [], None, print)
    with pytest.raises(InputError, match=r"none\.onnx: cannot be read: No such file"):
        compute("", [(tmp_path / "none.onnx", {})])


def test_drift_is_what_differs() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    (same,) = compare({"y": x}, {"y": x.copy()})
    assert (same.equal, same.max_abs, same.argmax) == (True, 0.0, 1.0)
    (other,) = compare({"y": x}, {"y": x[:, ::-1].copy()})
    assert (other.equal, other.max_abs, other.argmax) == (False, 1.0, 0.0) and other.of_range == pytest.approx(1 / 3)
    for broken in (x[:1], x.astype(np.float64), np.full_like(x, np.nan)):
        (apart,) = compare({"y": x}, {"y": broken})
        assert not apart.equal and apart.max_abs == apart.of_range == float("inf")
    (apart,) = compare({"y": np.full_like(x, np.nan)}, {"y": x})
    assert not apart.equal and apart.max_abs == apart.of_range == float("inf")
    (none,) = compare({"y": x[:0]}, {"y": x[:0]})
    assert (none.equal, none.argmax) == (True, 1.0)


def test_the_plugin_costs_other_users_of_pytest_nothing() -> None:
    """Loaded into every run of an environment, it brings in no module of ours but itself."""
    probe = (
        "import json, pytest, sys; before = set(sys.modules); import coordinator.emulate.plugin;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["coordinator", "coordinator.emulate", "coordinator.emulate.plugin"]
