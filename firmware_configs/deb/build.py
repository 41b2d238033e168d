"""Builds the Debian package of the agent: `python firmware_configs/deb/build.py --arch arm64`, with pip and dpkg-deb.

All libraries are inside, unpacked from their wheels: installing needs neither network nor pip. What is compiled for one
Python lies in a folder of its own (`cp311`), everything else in `any`; the launcher picks by the Python that it finds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Debian 12 and 13; 3.10 is JetPack 6, 3.12 is Ubuntu 24.04.
PYTHONS = ("3.11", "3.13")
PLATFORMS = {"arm64": "aarch64", "amd64": "x86_64"}
LIBRARY = "usr/lib/bmoe-agent"
LAUNCHER = "/usr/bin/bmoe-agent"
CONTROL = """Package: bmoe-agent
Version: {version}
Architecture: {arch}
Maintainer: bmoe
Section: net
Priority: optional
Depends: {python}
Recommends: ca-certificates, systemd-timesyncd | time-daemon
Installed-Size: {kilobytes}
Description: agent of bmoe: runs ONNX experts on a board and signs what they give
 The service starts once there is something to do: a join token on the boot
 partition, or an identity made by `bmoe-agent join`.
"""


def main() -> None:
    """Build the package that the arguments ask for, and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PLATFORMS, required=True)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="Python versions that the package is for")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = own_wheel(work / "own")
        version = wheel.name.split("-")[1]
        tree = work / "tree"
        for python in given.python:
            for found in wheels(work / python, wheel, given.arch, python):
                unpack(found, tree / LIBRARY, python)
        (tree / LIBRARY / "any/bmoe/_data/firmware_configs/deb/build.py").unlink(missing_ok=True)
        add_system_files(tree)
        given.output.mkdir(exist_ok=True)
        target = given.output / f"bmoe-agent_{version}_{given.arch}.deb"
        build(tree, target, version, given.arch, given.python)
        print(f"{target} ({target.stat().st_size >> 20} MB, Python {' and '.join(given.python)})")


def own_wheel(folder: Path) -> Path:
    """This checkout's wheel."""
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("bmoe-*.whl"))


def wheels(folder: Path, wheel: Path, arch: str, python: str) -> list[Path]:
    """The wheel with all that its extra `agent` needs, for one Python on one architecture."""
    platforms = [f"manylinux_{v}_{PLATFORMS[arch]}" for v in ("2_28", "2_27", "2_26", "2_24", "2_17")]
    platforms.append(f"manylinux2014_{PLATFORMS[arch]}")
    pip(
        "download", "--only-binary=:all:", "--dest", str(folder), "--python-version", python, "--implementation", "cp",
        *(word for platform in platforms for word in ("--platform", platform)), f"{wheel}[agent]",
    )  # fmt: skip
    return sorted(folder.glob("*.whl"))


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words], check=True)


def unpack(wheel: Path, library: Path, python: str) -> None:
    """A wheel's files into the folder of its Python, or into `any` where every Python 3 may load it."""
    _, _, interpreter, abi, _ = re.sub(r"(-\d[^-]*)-\d[^-]*(-[^-]+-[^-]+-[^-]+)$", r"\1\2", wheel.stem).split("-")
    shared = abi == "abi3" or (abi == "none" and not re.fullmatch(r"cp3\d+", interpreter))
    folder = library / ("any" if shared else f"cp{python.replace('.', '')}")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".data/" not in name and "/tests/" not in name and not name.endswith("/"):
                there = folder / name
                if there.exists() and there.read_bytes() != archive.read(name):
                    raise SystemExit(f"{wheel.name}: another version has put {name} where every Python looks already")
                archive.extract(name, folder)


def add_system_files(tree: Path) -> None:
    """The launcher and the units, which name it."""
    launcher = tree / LAUNCHER[1:]
    launcher.parent.mkdir(parents=True)
    shutil.copyfile(HERE / "launcher", launcher)
    launcher.chmod(0o755)
    folder = tree / "lib/systemd/system"
    folder.mkdir(parents=True)
    for unit in (HERE.parent / "systemd").glob("*.service"):
        text = unit.read_text().replace("/opt/bmoe/bin/bmoe-agent", LAUNCHER)
        (folder / unit.name).write_text(text)


def dependency(pythons: list[str]) -> str:
    """On a Python 3 of one of these versions, and none between them."""
    minors = sorted(int(python.split(".")[1]) for python in pythons)
    wanted = [f"python3 (>= 3.{minors[0]})", f"python3 (<< 3.{minors[-1] + 1})"]
    for earlier, later in itertools.pairwise(minors):
        if later > earlier + 1:
            wanted.append(f"python3 (<< 3.{earlier + 1}) | python3 (>= 3.{later})")
    return ", ".join(wanted)


def build(tree: Path, target: Path, version: str, arch: str, pythons: list[str]) -> None:
    """The package of a tree; the same tree gives the same bytes."""
    kilobytes = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file()) >> 10
    control = tree / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        CONTROL.format(version=version, arch=arch, kilobytes=kilobytes, python=dependency(pythons))
    )
    for script in ("postinst", "prerm", "postrm"):
        shutil.copyfile(HERE / script, control / script)
        (control / script).chmod(0o755)
    for path in tree.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif path.parent != control and path != tree / LAUNCHER[1:]:
            path.chmod(0o644)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1767225600")}
    words = ["dpkg-deb", "--root-owner-group", "-Zzstd", "--build", str(tree), str(target)]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
