"""The update core: one version of a model, from bytes that nobody vouches for to experts that tasks may run.

The same steps whether the bytes come over HTTPS or through Flower:
1 metadata   the repository's own word, by python-tuf: signatures, thresholds, no version older than one seen, not expired
2 manifest   what the version is made of, and that this board can hold it
3 ledger     the model and each of its parts are on the ledger, final, by receipts read offline
4 download   each file, resumed where it broke off; size and SHA-256 as the metadata says
5 check      each ONNX file can be served and is what the manifest declares
6 self-test  each expert reproduces its golden pair, in a process of its own
7 move       experts to where tasks find them by digest; those of the version in use stay
8 switch     one record replaced: from here on the version is installed, and the one before is kept
A crash or a refusal before 8 leaves the old version. Called in a process of its own, never on the path of a task.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater, UpdaterConfig

from bmoe.protocol.errors import BmoeError, ConfigError, ManifestError, ModelError, RefusedError, UnavailableError
from bmoe.protocol.files import sync_folder
from bmoe.protocol.text import plain
from bmoe.storage.download import check_room, install, obtain, tidy
from bmoe.storage.installed import Version, read_record, switch, updates_folder
from bmoe.storage.manifest import MAX_MANIFEST_BYTES, Expert, Model, parse_manifest
from bmoe.storage.onnx_file import read_onnx_file
from bmoe.storage.onnx_rules import check_declared, check_servable
from bmoe.storage.targets import METADATA_BYTES, experts_and_gate, manifest_target, part_targets
from bmoe.storage.update_ledger import Word, check_entered
from bmoe.storage.update_source import BASE, MetadataFetcher, Source

STEPS = ("metadata", "manifest", "ledger", "download", "check", "self-test", "move", "switch", "done")
ROOT_BYTES = 512_000
# From the first root, which a board pins, to the newest: two a year are renewals, the rest changes of keys.
ROOTS_MAX = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")
Hook = Callable[[str], None]
# Runs one expert (file) on its golden pair (file, None where there is none); raises what says that it does not do.
SelfTest = Callable[[Expert, Path, "Path | None"], None]


@dataclass(frozen=True)
class Wanted:
    """The version of a model that this board is to have."""

    model: str
    version: int


@dataclass(frozen=True)
class Trusted:
    """What a board takes on trust: the repository's first root, the ledger's policy, and how much it takes at most."""

    root: bytes
    word: Word
    file_bytes: int
    memory_mb: int


@dataclass(frozen=True)
class Installed:
    """The version is in use; `previous` is the one kept, 0 if there was none. `changed` is False where it was before."""

    model: str
    version: int
    previous: int
    changed: bool = True


@dataclass(frozen=True)
class Refused:
    """The old version stays in use, and why: the step, one clear line, and whether trying again may help."""

    step: str
    reason: str
    again: bool = False


def apply(
    source: Source, state: Path, wanted: Wanted, trust: Trusted, self_test: SelfTest, at: Hook = lambda step: None
) -> Installed | Refused:
    """Install a version, or say why not; never raises for anything that a source, a file or a disk can do.

    `at(step)` is called before each step, and from "download" to "move" before each file of it; "done" at the end. Faults
    are injected there, progress is told.
    """
    now = STEPS[0]

    def hook(step: str) -> None:
        nonlocal now
        now = step
        at(step)

    try:
        with _alone(state):
            return _apply(source, state, wanted, trust, self_test, hook)
    except (BmoeError, RepositoryError, DownloadError, OSError, MemoryError) as error:
        return Refused(now, plain(_line(error), 400), _passes(error))


def _apply(
    source: Source, state: Path, wanted: Wanted, trust: Trusted, self_test: SelfTest, at: Hook
) -> Installed | Refused:
    at("metadata")
    updater = _refreshed(source, state, trust.root)
    target = _target(updater, manifest_target(wanted.model, wanted.version))
    at("manifest")
    model, version = _manifest(source, state, wanted, target)
    _check_fits(model, trust)
    files = _files(updater, model)
    at("ledger")
    releases = check_entered(source, trust.word, model, bytes.fromhex(version.manifest))
    known = read_record(state, wanted.model)
    if known is not None and known.current == version and all(_there(state, p) for p in version.parts):
        return Installed(wanted.model, wanted.version, known.previous.version if known.previous else 0, False)
    at("download")
    check_room(state, files)
    paths = {}
    for sha256, size in files.items():
        at("download")
        paths[sha256] = obtain(source, state, sha256, size)
    for part in experts_and_gate(model):
        at("check")
        _check_onnx(paths[part.sha256], part)
    for part in experts_and_gate(model):
        at("self-test")
        self_test(part, paths[part.sha256], paths[part.golden.sha256] if part.golden else None)
    for part in experts_and_gate(model):
        at("move")
        install(state, paths[part.sha256], part.sha256, releases[part.sha256])
    at("switch")
    record = switch(state, wanted.model, version)
    tidy(state, (version.manifest, *files))
    at("done")
    return Installed(wanted.model, wanted.version, record.previous.version if record.previous else 0)


def _refreshed(source: Source, state: Path, root: bytes) -> Updater:
    folder = updates_folder(state) / "metadata"
    folder.mkdir(parents=True, exist_ok=True)
    config = UpdaterConfig(
        root_max_length=ROOT_BYTES, snapshot_max_length=METADATA_BYTES, targets_max_length=METADATA_BYTES,
        max_root_rotations=ROOTS_MAX,
    )  # fmt: skip
    fetcher = MetadataFetcher(source, METADATA_BYTES)
    updater = Updater(str(folder), BASE + "metadata/", fetcher=fetcher, config=config, bootstrap=root)
    try:
        updater.refresh()
    finally:
        _sync(folder)
    return updater


def _sync(folder: Path) -> None:
    """python-tuf writes without a sync: a power cut would lose the versions seen, and with them the bar to older ones."""
    for path in (*folder.glob("*.json"), *folder.glob("root_history/*.json")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _target(updater: Updater, path: str) -> TargetFile:
    found = updater.get_targetinfo(path)
    if found is None:
        raise RefusedError(f"{path} is not in the repository: withdrawn, or never published by the model's owner")
    return found


def _manifest(source: Source, state: Path, wanted: Wanted, target: TargetFile) -> tuple[Model, Version]:
    sha256 = target.hashes.get("sha256", "")
    if _SHA256.fullmatch(sha256) is None:
        raise RefusedError("the repository names the manifest by no SHA-256")
    if not 0 < target.length <= MAX_MANIFEST_BYTES:
        raise RefusedError(f"the manifest has {target.length} bytes, at most {MAX_MANIFEST_BYTES} are taken")
    data = obtain(source, state, sha256, target.length).read_bytes()
    target.verify_length_and_hashes(data)
    model = parse_manifest(data)
    if (model.name, model.version) != (wanted.model, wanted.version):
        raise ManifestError(f"the manifest is of {model.name} {model.version}, not of {wanted.model} {wanted.version}")
    return model, Version(model.version, sha256, tuple(part.sha256 for part in experts_and_gate(model)))


def _check_fits(model: Model, trust: Trusted) -> None:
    for size, sha256 in part_targets(model).values():
        if size > trust.file_bytes:
            raise RefusedError(f"{sha256[:16]} has {size} bytes, this board takes {trust.file_bytes}")
    for part in experts_and_gate(model):
        if part.memory_mb > trust.memory_mb:
            raise RefusedError(f"{part.file} needs {part.memory_mb} MB of memory, this board gives {trust.memory_mb}")


def _files(updater: Updater, model: Model) -> dict[str, int]:
    """Size by SHA-256 of all that the version needs; the metadata must say the same as the manifest."""
    found = {}
    for path, (size, sha256) in part_targets(model).items():
        target = _target(updater, path)
        if (target.length, target.hashes.get("sha256")) != (size, sha256):
            raise RefusedError(f"the repository's metadata says of {path} something else than the manifest")
        found[sha256] = size
    return found


def _check_onnx(path: Path, part: Expert) -> None:
    try:
        onnx = read_onnx_file(path)
        check_servable(onnx)
        check_declared(onnx, part)
    except ModelError as error:
        raise ModelError(f"{part.file}: {error}") from None


def _there(state: Path, sha256: str) -> bool:
    return (state / "experts" / f"{sha256}.onnx").is_file()


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """One update at a time, whoever brings it; a killed one holds nothing."""
    folder = updates_folder(state)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UnavailableError("another update is in work on this board") from None
        yield


def _line(error: Exception) -> str:
    """What is wrong, in words for whoever reads the log; python-tuf's own say what it compared."""
    cause = error.__cause__ if isinstance(error, DownloadError) else None
    if isinstance(cause, BmoeError):
        return str(cause)
    for kind, meaning in _MEANINGS:
        if isinstance(error, kind):
            return f"{meaning}: {error}"
    if isinstance(error, MemoryError):
        return "this board has not enough memory for it now"
    if isinstance(error, OSError):
        return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror or error}"
    return str(error)


_MEANINGS: tuple[tuple[type[Exception], str], ...] = (
    (ExpiredMetadataError, "the repository's metadata is out of date (frozen, or nobody renews it)"),
    (BadVersionNumberError, "the repository went back to older metadata"),
    (UnsignedMetadataError, "too few of the right keys signed the repository's metadata"),
    (LengthOrHashMismatchError, "a file is not the one that the repository's metadata names"),
    (DownloadHTTPError, "the repository lacks a file"),
    (DownloadError, "the repository cannot be read"),
    (RepositoryError, "the repository's metadata is not acceptable"),
)


_PASSES = (
    UnavailableError, DownloadError, ExpiredMetadataError, OSError, MemoryError,
    BadVersionNumberError,  # who brings it is behind what was seen here already
    ConfigError,  # this board's own files or processes, not the release
)  # fmt: skip


def _passes(error: Exception) -> bool:
    """Whether the same update may succeed later: something was not there, or the disk was full, or time was needed."""
    return isinstance(error, _PASSES) and not isinstance(error, DownloadHTTPError)
