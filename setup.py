"""Ships models/ and firmware_configs/ inside the wheel as bmoe/_data; everything else is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = (
    "models/*/model.json",
    "models/*/origin.json",
    "models/*/*.onnx",
    "models/*/*.npz",
    "models/*/MODEL.md",
    "firmware_configs/**/*",
)


def shipped_files(root: Path) -> list[str]:
    """Paths relative to `root`, with '/', of every data file that belongs into the wheel."""
    found = {path.relative_to(root) for pattern in SHIPPED for path in root.glob(pattern) if path.is_file()}
    return sorted(path.as_posix() for path in found if "__pycache__" not in path.parts)


class BuildWithData(build_py):
    """build_py that also copies the data. An editable install copies nothing: there the checkout itself is read."""

    def run(self) -> None:
        """Build, then copy the data files to where `packaged` looks for them."""
        super().run()
        if not self.editable_mode:
            for name in shipped_files(ROOT):
                target = Path(self.build_lib, "bmoe", "_data", name)
                self.mkpath(str(target.parent))
                self.copy_file(str(ROOT / name), str(target))

    def get_source_files(self) -> list[str]:
        """Named here, the data also lands in the source distribution, from which a wheel can be built again."""
        return [*super().get_source_files(), *shipped_files(ROOT)]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithData})
