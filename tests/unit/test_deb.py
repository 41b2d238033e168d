"""The Debian package's life on a system, by dpkg itself: installed, switched off, renewed, removed, back again, purged.

The package is made by the builder's own steps of this checkout and no wheel: its libraries are no matter here. dpkg and
the scripts work in a tree of their own (DPKG_ROOT), without root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from scripts import by_path

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3")
pytestmark = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None or not SYSTEM_PYTHON.exists(), reason="no Debian: neither dpkg nor its Python"
)
# Enough for `bmoe-agent --version`, and one that the agent never imports.
MODULES = (
    "bmoe/__init__.py", "bmoe/protocol/__init__.py", "bmoe/protocol/errors.py", "edge_agent/__init__.py",
    "edge_agent/cli.py", "edge_agent/cli_board.py", "edge_agent/cli_source.py", "edge_agent/source_service.py",
    "edge_agent/doctor.py",
)  # fmt: skip
WANTS = "etc/systemd/system/multi-user.target.wants"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The package in two versions."""
    build = by_path(ROOT / "firmware_configs/deb/build.py")
    words = [str(SYSTEM_PYTHON), "-c", "import sys; print('3.%d' % sys.version_info[1])"]
    python = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()
    folder, made = tmp_path_factory.mktemp("packages"), {}
    for version in ("0.1.0", "0.1.1"):
        tree = folder / version
        for module in MODULES:
            target = tree / build.LIBRARY / "any" / module
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / module, target)
        (tree / build.LIBRARY / f"cp{python.replace('.', '')}").mkdir()
        build.add_system_files(tree)
        made[version] = folder / f"{version}.deb"
        build.build(tree, made[version], version, arch, [python])
    return made


class System:
    """A root file system with dpkg's database and nothing in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("var/lib/dpkg/info", "var/lib/dpkg/updates"):
            (root / name).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()

    def dpkg(self, *words: str | Path) -> None:
        forced = "not-root,script-chrootless,depends,unsafe-io,bad-path"
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(
            ["dpkg", f"--root={self.root}", f"--force-{forced}", *map(str, words)],
            check=True, capture_output=True, timeout=60, env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip

    def enabled(self) -> set[str]:
        wants = self.root / WANTS
        return {path.name for path in wants.iterdir()} if wants.exists() else set()

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.root / "usr/bin/bmoe-agent"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=cwd, env=environment)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "system")


def test_its_life_from_the_first_installation_to_the_purge(system: System, packages: dict[str, Path]) -> None:
    both = {"bmoe-agent.service", "bmoe-source.service"}
    state = system.root / "var/lib/bmoe-agent"
    system.dpkg("--install", packages["0.1.0"])
    assert system.enabled() == both
    unit = (system.root / "lib/systemd/system/bmoe-agent.service").read_text()
    assert "\nExecStart=/usr/bin/bmoe-agent run\n" in unit and not list((system.root / "etc").rglob("*agent.service.d"))
    state.mkdir()
    (state / "agent.toml").write_text("queue_limit = 8\n")
    drop_in = system.root / "etc/systemd/system/bmoe-agent.service.d/50-gpu.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\n")
    own = drop_in.with_name("override.conf")
    own.write_text("[Service]\nNice=1\n")

    (system.root / WANTS / "bmoe-source.service").unlink()
    system.dpkg("--install", packages["0.1.1"])
    assert system.enabled() == {"bmoe-agent.service"}, "what was switched off stays off"
    system.dpkg("--remove", "bmoe-agent")
    assert not (system.root / "usr/lib/bmoe-agent").exists() and (state / "agent.toml").exists() and drop_in.exists()
    system.dpkg("--install", packages["0.1.0"])
    assert system.enabled() == {"bmoe-agent.service"}, "and what was on is on when it comes back"
    system.dpkg("--purge", "bmoe-agent")
    assert system.enabled() == set() and not state.exists() and not drop_in.exists()
    assert own.exists(), "an administrator's own change is none of the package's"
    assert not [path for path in system.root.rglob("*bmoe*") if "dpkg" not in path.parts and path != own.parent]


def test_what_is_installed_runs_and_takes_nothing_from_where_it_is_called(
    system: System, packages: dict[str, Path], tmp_path: Path
) -> None:
    system.dpkg("--install", packages["0.1.0"])
    library = system.root / "usr/lib/bmoe-agent"
    assert list(library.rglob("edge_agent/__pycache__/source_service*.pyc")), "compiled by root, once"
    assert not list(library.rglob("edge_agent/__pycache__/doctor*.pyc")), "of what it never imports there is none"
    # Root calls it in a folder where anybody may write.
    trap = tmp_path / "trap"
    (trap / "edge_agent").mkdir(parents=True)
    for name in ("argparse.py", "json.py", "edge_agent/__init__.py"):
        (trap / name).write_text("raise SystemExit('taken over')\n")
    done = system.run("--version", cwd=trap)
    assert (done.returncode, done.stdout) == (0, "bmoe-agent 0.1.0\n"), done.stderr
    [own] = library.glob("cp3*")
    own.rename(own.with_name("cp30"))
    done = system.run("--version", cwd=trap)
    assert done.returncode == 1 and re.fullmatch(
        r"bmoe-agent: this package is for other Pythons \(cp30\) than 3\.\d+\.\d+\n", done.stderr
    )
    own.with_name("cp30").rename(own)
    system.dpkg("--remove", "bmoe-agent")
    assert not library.exists()


def test_it_asks_for_the_pythons_that_are_inside_and_none_between(tmp_path: Path) -> None:
    build = by_path(ROOT / "firmware_configs/deb/build.py")
    assert build.dependency(["3.13", "3.11"]) == (
        "python3 (>= 3.11), python3 (<< 3.14), python3 (<< 3.12) | python3 (>= 3.13)"
    )
    assert build.dependency(["3.12"]) == "python3 (>= 3.12), python3 (<< 3.13)"


def test_two_versions_of_what_every_python_loads_are_noticed(tmp_path: Path) -> None:
    build = by_path(ROOT / "firmware_configs/deb/build.py")
    for python, version in (("3.11", "1"), ("3.13", "2")):
        wheel = tmp_path / f"pure-{version}.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("pure.py", f"VERSION = {version}\n")
        if version == "2":
            with pytest.raises(SystemExit, match=r"pure-2.0-py3-none-any.whl: another version"):
                build.unpack(wheel, tmp_path / "library", python)
        else:
            build.unpack(wheel, tmp_path / "library", python)
