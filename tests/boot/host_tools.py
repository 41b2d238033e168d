"""Programs of this machine that the boot test needs: installed ones, or Debian's, unpacked into the cache without root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from coordinator.emulate import apt
from coordinator.emulate.cache import cache_folder, kept
from coordinator.emulate.tools import last_words, run_tool

PROGRAMS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "mcopy": "mtools",
    "mdir": "mtools",
    "mkfs.vfat": "dosfstools",
    "mkfs.ext4": "e2fsprogs",
    "fakeroot": "fakeroot",
}
SBIN = ("/usr/sbin", "/sbin")
STATUS = Path("/var/lib/dpkg/status")
FOLDER = "host-tools"


class HostTools:
    """Finds each program, having fetched those that are not installed."""

    def __init__(self) -> None:
        self.folder = cache_folder() / FOLDER
        if not all(map(self._find, PROGRAMS)):
            kept(FOLDER, _fetch, print)
        lost = [program for program in PROGRAMS if not self._find(program)]
        if lost:
            raise ConfigError(f"the boot test needs {', '.join(lost)}; fetched into {self.folder}, they are not there")

    def path(self, program: str) -> str:
        """Where a program is."""
        found = self._find(program)
        assert found is not None, program
        return found

    def environment(self) -> dict[str, str]:
        """With which fetched programs find their libraries."""
        libraries = sorted({str(path.parent) for path in self.folder.glob("usr/lib/*/lib*.so.*")})
        given = os.environ.get("LD_LIBRARY_PATH")  # fakeroot's own, where this runs under it
        joined = os.pathsep.join([*libraries, *([given] if given else [])])
        return {**os.environ, "LD_LIBRARY_PATH": joined, "MTOOLS_SKIP_CHECK": "1"}

    def fakeroot(self) -> list[str]:
        """fakeroot, as what stands before a command. Where it lies is told it: unpacked, it looks in the wrong place."""
        for place in (self.folder, Path("/")):
            for library in place.glob("usr/lib/*/libfakeroot/libfakeroot-sysv.so"):
                faked = place / "usr" / "bin" / "faked-sysv"
                return [self.path("fakeroot"), "--lib", str(library), "--faked", str(faked), "--"]
        raise ConfigError("fakeroot has no library libfakeroot-sysv.so here")

    def run(self, *command: object) -> str:
        """Run a program of ours to its end; what it said."""
        words = [str(word) for word in command]
        done = subprocess.run(
            [self.path(words[0]), *words[1:]],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            raise ConfigError(f"{words[0]} failed: {last_words(done.stderr or done.stdout)}")
        return done.stdout

    def data(self, name: str) -> str:
        """QEMU's folder of data files, "" where it is installed."""
        path = self.folder / "usr" / "share" / name
        return str(path) if path.is_dir() else ""

    def _find(self, program: str) -> str | None:
        ours = [self.folder / place / program for place in ("usr/bin", "usr/sbin")]
        # fakeroot's own is named by an alternative that no configuration step has made.
        ours += [self.folder / "usr" / "bin" / f"{program}-sysv"]
        found = next((str(path) for path in ours if path.exists()), None)
        return found or shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *SBIN]))


def _fetch(folder: Path) -> None:
    """All of them: what is installed meanwhile or no more is then no matter."""
    release = apt.codename(apt.OS_RELEASE.read_text())
    architecture = run_tool("dpkg", ["dpkg", "--print-architecture"], 30).strip()
    archive = apt.Archive(folder / "apt", apt.machine_sources(release), (architecture,), STATUS)
    archive.update()
    apt.unpack(archive.fetch(sorted(set(PROGRAMS.values()))), folder)
    shutil.rmtree(folder / "apt")
