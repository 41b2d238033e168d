"""Packages of another architecture from the machine's own Debian sources: fetched and unpacked, never installed, no root.

apt runs on a private state: no lock, list or setting of the system's is touched, and none of its hooks is run.
What is fetched is checked by apt itself: each package by a digest, and the digests by the signature of the archive.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError
from coordinator.emulate.tools import last_words, run_tool

SOURCES = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")
FETCH_WITHIN_S = 600.0
TOOLS = ("apt-get", "dpkg-deb", "tar")
POCKETS = ("", "-updates", "-security")
LEFT_OUT = ("doc", "man", "locale", "info", "lintian", "bug")
OFF = ("no", "false", "without", "off", "disable", "0")  # as apt spells it
# Read after the machine's own settings: its hooks are for its own packages, and what nobody signed is not taken.
SETTINGS = """#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
APT::Get::AllowUnauthenticated "false";
"""
_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)")


@dataclass(frozen=True)
class Source:
    """One suite of one archive, component main. `keyring`: paths of the keys that sign it, "" for the system's."""

    uri: str
    suite: str
    keyring: str

    def line(self, architectures: Sequence[str]) -> str:
        """As apt reads it, for these architectures."""
        signed = f" signed-by={self.keyring}" if self.keyring else ""
        return f"deb [arch={','.join(architectures)}{signed}] {self.uri} {self.suite} main"


def codename(os_release: str) -> str:
    """The release of this Debian. Raises ConfigError for another system: only Debian's packages are known to fit."""
    facts = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.M))
    if facts.get("ID") != "debian" or not facts.get("VERSION_CODENAME"):
        found = facts.get("PRETTY_NAME", "an unnamed system")
        raise ConfigError(f"emulation fetches packages with Debian's apt, and this is {found}: use a Debian container")
    return facts["VERSION_CODENAME"]


def machine_sources(release: str, folder: Path | None = None) -> list[Source]:
    """What this machine fetches `release` from. Raises ConfigError where it has no source of it."""
    folder = folder or SOURCES
    files = sorted((folder / "sources.list.d").glob("*.sources"))
    found = [source for path in files for source in deb822_sources(path.read_text(errors="replace"))]
    for path in (folder / "sources.list", *sorted((folder / "sources.list.d").glob("*.list"))):
        if path.is_file():
            found += one_line_sources(path.read_text(errors="replace"))
    wanted = [source for source in found if source.suite in {release + pocket for pocket in POCKETS}]
    if not any(source.suite == release for source in wanted):
        raise ConfigError(f"no source of Debian {release} main under {folder}: emulation fetches its packages there")
    return list(dict.fromkeys(wanted))


def deb822_sources(text: str) -> list[Source]:
    """The sources with component main of a *.sources file."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = "\n".join(line for line in paragraph.splitlines() if not line.startswith("#"))
        fields = {
            key.lower(): value.split() for key, value in re.findall(r"^([\w-]+):((?:.*(?:\n[ \t].*)*))", lines, re.M)
        }
        if "deb" not in fields.get("types", ()) or "main" not in fields.get("components", ()):
            continue
        if fields.get("enabled", ["yes"])[0].lower() in OFF:
            continue
        keyring = ",".join(word for word in fields.get("signed-by", ()) if word.startswith("/"))
        found += [Source(uri, suite, keyring) for uri in fields.get("uris", ()) for suite in fields.get("suites", ())]
    return found


def one_line_sources(text: str) -> list[Source]:
    """The sources with component main of a *.list file."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.split("#")[0].strip())
        if match is not None and "main" in match["components"].split():
            options = dict(part.partition("=")[::2] for part in (match["options"] or "").split())
            found.append(Source(match["uri"], match["suite"], options.get("signed-by", "")))
    return found


class Archive:
    """apt on a state of its own in `folder`, the first architecture its native one.

    `status`: dpkg's record of what is installed and need not be fetched; without it, nothing is. Every method raises
    UnavailableError with apt's last words.
    """

    def __init__(
        self, folder: Path, sources: Iterable[Source], architectures: Sequence[str], status: Path | None = None
    ) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise ConfigError(f"emulation needs {', '.join(missing)}, which a Debian system has")
        self.folder, self.debs = folder, folder / "cache" / "archives"
        for name in ("lists/partial", "cache/archives/partial", "preferences"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        status = status or folder / "status"
        if not status.exists():
            status.touch()
        (folder / "sources.list").write_text("".join(source.line(architectures) + "\n" for source in sources))
        quoted = ", ".join(architectures)
        (folder / "settings").write_text(SETTINGS)
        self._options = [
            f"APT::Architecture={architectures[0]}", f"APT::Architectures={quoted.replace(' ', '')}",
            "APT::Install-Recommends=false", "APT::Sandbox::User=root", "Debug::NoLocking=1", "Acquire::Languages=none",
            f"Dir::State={folder}", f"Dir::State::status={status}", f"Dir::State::lists={folder / 'lists'}",
            f"Dir::Cache={folder / 'cache'}", f"Dir::Etc::sourcelist={folder / 'sources.list'}",
            "Dir::Etc::sourceparts=/dev/null", f"Dir::Etc::preferencesparts={folder / 'preferences'}",
            "Dir::Etc::preferences=/dev/null",
        ]  # fmt: skip

    def update(self) -> None:
        """Fetch the lists."""
        self._apt("update", "--error-on=any")

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """Fetch packages and all they depend on; their files, in the order of names."""
        self._apt("install", "--yes", "--download-only", *packages)
        return sorted(self.debs.glob("*.deb"))

    def fetch_one(self, package: str, into: Path) -> Path:
        """Fetch one package alone."""
        into.mkdir(parents=True, exist_ok=True)
        self._apt("download", package, cwd=into)
        return next(into.glob(f"{package.partition(':')[0]}_*.deb"))

    def _apt(self, *arguments: str, cwd: Path | None = None) -> None:
        options = [word for option in self._options for word in ("-o", option)]
        command = ["apt-get", "-q", "-c", str(self.folder / "settings"), *options, *arguments]
        run_tool(f"apt-get {arguments[0]}", command, FETCH_WITHIN_S, cwd)


def unpack(debs: Iterable[Path], root: Path) -> None:
    """Lay the files of packages out under `root`, /bin, /lib and /sbin merged into /usr; nothing is configured.

    Raises UnavailableError for a package that is damaged, or would write through another's link to outside of `root`.
    """
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    excluded = [f"--exclude=./usr/share/{name}" for name in LEFT_OUT]
    for deb in debs:
        _check_places(deb, root)
        _tar(deb, ["-x", "-C", str(root), "--keep-directory-symlink", "--no-same-owner", *excluded])


def unpack_file(deb: Path, member: str, into: Path) -> Path:
    """One file of a package; `member` as "./usr/bin/…". Raises UnavailableError where it is not a plain file there."""
    into.mkdir(parents=True, exist_ok=True)
    _tar(deb, ["-x", "-C", str(into), "--no-same-owner", member])
    if not (into / member).is_file() or (into / member).is_symlink():
        raise UnavailableError(f"{deb.name} holds no plain file {member}")
    return into / member


def _check_places(deb: Path, root: Path) -> None:
    """tar itself keeps to the root, and to the links of the package that it reads: not to those of one before."""
    inside = os.path.realpath(root)
    for folder in {os.path.dirname(name) for name in _tar(deb, ["-t", "--quoting-style=literal"]).splitlines()}:
        place = os.path.realpath(os.path.join(inside, folder.lstrip("/")))
        if place != inside and not place.startswith(inside + os.sep):
            raise UnavailableError(f"{deb.name} would write into {place}, by way of {folder}: it is not unpacked")


def _tar(deb: Path, arguments: Sequence[str]) -> str:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as reading:
        done = subprocess.run(
            ["tar", *arguments], stdin=reading.stdout, capture_output=True, text=True, errors="surrogateescape",
            check=False,
        )  # fmt: skip
    if done.returncode != 0 or reading.returncode not in (0, -13):
        raise UnavailableError(f"{deb.name} cannot be unpacked: {last_words(done.stderr)}")
    return done.stdout
