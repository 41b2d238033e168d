"""Where the files of the SuperLink lie, how its commands are found, and the environment in which they run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably
from coordinator.embedded.state_dir import private_dir

CONNECTION = "bmoe"
_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "{what}"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bmoe"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
{config}
"""


def app_files(package: str, what: str, server: str, client: str, config: str) -> dict[str, str]:
    """The files of a Flower app by path: the code of its two modules, and a project file as `flwr run` wants it."""
    project = _PROJECT.format(name=package.replace("_", "-"), what=what, package=package, config=config)
    return {
        f"{package}/__init__.py": f'"""{what}."""\n',
        f"{package}/server_app.py": server,
        f"{package}/client_app.py": client,
        "pyproject.toml": project,
    }


# Its code is installed with bmoe, on both sides.
APP = app_files(
    "bmoe_releases", "Carries signed expert releases to agents",
    'from coordinator.flower.bridge import app\n\n__all__ = ["app"]\n',
    'from edge_agent.flower.client import app\n\n__all__ = ["app"]\n',
    'socket = ""',
)  # fmt: skip


def has_flower() -> bool:
    """Whether the `federation` extra is installed here."""
    return importlib.util.find_spec("flwr") is not None


def flower_program(name: str) -> str:
    """The path of one of flwr's commands, which lie beside our interpreter; raises ConfigError without the extra."""
    path = Path(sys.executable).parent / name
    if not has_flower() or not path.exists():
        raise ConfigError(f"{name} is not installed: pip install 'bmoe[federation]'")
    return str(path)


@dataclass(frozen=True)
class FlowerLayout:
    """Paths under `state`/flower."""

    folder: Path

    @property
    def wanted(self) -> Path:
        """Its presence tells `bmoe up` to start SuperLink and host: the first rollout makes it."""
        return self.folder / "wanted"

    @property
    def database(self) -> Path:
        """The SuperLink's own database."""
        return self.folder / "superlink.db"

    @property
    def keys(self) -> Path:
        """DEVICE.pub for each enrolled device that wants a SuperNode; the registrar writes them."""
        return self.folder / "keys"

    @property
    def nodes(self) -> Path:
        """Which node id and key each device is registered with."""
        return self.folder / "nodes.json"

    @property
    def socket(self) -> Path:
        """Where the bridge finds the coordinator."""
        return self.folder / "bridge.sock"

    @property
    def app(self) -> Path:
        """The Flower app, written anew at each start."""
        return self.folder / "app"

    @property
    def home(self) -> Path:
        """flwr's own folder, instead of one in the user's home."""
        return self.folder / "home"

    def environment(self) -> Mapping[str, str]:
        """For every process of flwr: its own folder; no telemetry, no look for updates, nothing installed at run time.

        A SuperLink finds the commands that it starts by PATH, where they need not be: a service's PATH names no venv.
        """
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(self.home.resolve()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }

    def prepare(self, port: int, ca: Path) -> None:
        """Write the app and the connection that flwr's commands use."""
        for folder in (self.folder, self.keys, self.home):
            private_dir(folder)
        for name, text in APP.items():
            write_durably(self.app / name, text.encode())
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{ca.resolve()}"\n'
        )
        write_durably(self.home / "config.toml", text.encode())
