"""Where a repository's files lie: a folder, or any URL that obstore takes (s3://, gs://, az://, memory:///).

What a store promises: when `put` or `put_file` returns, the whole file is there and survives a crash, or an error was
raised and the old one is; a reader never sees a part. Nothing read is believed here: readers check digests.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from bmoe.protocol.errors import ConfigError, InputError, LimitError, UnavailableError, UnknownError
from bmoe.protocol.files import make_folder, sync_folder, write_durably

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30


class Store(Protocol):
    """Files by relative path. Every call raises UnavailableError when the store cannot be reached or written."""

    def put(self, path: str, data: bytes) -> None:
        """Write or replace a small file."""

    def put_file(self, path: str, source: Path) -> None:
        """Write a file from one on disk; one that is there, of the same size at least, is left as it is."""

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

    def size(self, path: str) -> int | None:
        """How many bytes the file has; None where there is none."""

    def stream(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """The file from `offset` on, in chunks; raises UnknownError where there is none."""


def read_whole(store: Store, path: str, limit: int) -> bytes:
    """The file; raises UnknownError where there is none, LimitError for more than `limit` bytes."""
    data = bytearray()
    for chunk in store.stream(path):
        data += chunk
        if len(data) > limit:
            raise LimitError(f"{path} has more than the {limit} bytes expected")
    return bytes(data)


def open_store(place: str | Path) -> Store:
    """The store at a folder or URL; raises ConfigError for a URL that nothing here can open."""
    text = str(place)
    if "://" not in text:
        return FolderStore(Path(text))
    if text.startswith("file://"):
        return FolderStore(Path(text.removeprefix("file://")))
    return UrlStore(text)


class FolderStore:
    """A folder on a local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, path: str, data: bytes) -> None:
        """Write or replace a small file."""
        with self._named(path) as file:
            write_durably(file, data)

    def put_file(self, path: str, source: Path) -> None:
        """Link the file where the disk is the same, copy it otherwise; one of other bytes is replaced."""
        with self._named(path) as file:
            if file.is_file() and (file.samefile(source) or filecmp.cmp(file, source, shallow=False)):
                return
            make_folder(file.parent)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            try:
                _link_or_copy(source, temporary)
                os.replace(temporary, file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(file.parent)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with self._named(path) as file:
            file.unlink(missing_ok=True)

    def size(self, path: str) -> int | None:
        """How many bytes the file has; None where there is none."""
        with self._named(path) as file:
            return file.stat().st_size if file.is_file() else None

    def stream(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """The file from `offset` on, in chunks; raises UnknownError where there is none."""
        with self._named(path) as file, file.open("rb") as stream:
            stream.seek(offset)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    @contextlib.contextmanager
    def _named(self, path: str) -> Iterator[Path]:
        file = self.folder / checked(path)
        try:
            yield file
        except (FileNotFoundError, IsADirectoryError):
            raise UnknownError(f"{self.folder} has no {path}") from None
        except OSError as error:
            raise UnavailableError(f"{file}: {error.strerror or error}") from None


class UrlStore:
    """Whatever obstore reaches. Credentials come from the environment, as its documentation says (AWS_..., and so on)."""

    def __init__(self, url: str, **options: Any) -> None:
        """Raises ConfigError for a URL that obstore does not take, or where it is not installed."""
        self.url = url.rstrip("/")
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(f"{url} needs obstore: pip install 'bmoe[gateway]' on Python 3.11 or later") from None
        client: Any = {"timeout": f"{TIMEOUT_S}s", "connect_timeout": "5s", "allow_http": True}
        try:
            self._store: Any = from_url(self.url, client_options=client, **options)
        except (ValueError, TypeError, obstore.exceptions.BaseError) as error:
            raise ConfigError(f"{url}: {_first_line(error)}") from None
        self._obstore = obstore

    def put(self, path: str, data: bytes) -> None:
        """Write or replace a small file."""
        with self._named(path) as name:
            self._obstore.put(self._store, name, data)

    def put_file(self, path: str, source: Path) -> None:
        """Upload a file, in several parts where it is large; one of the same size that is there is left as it is."""
        with self._named(path) as name:
            size = source.stat().st_size
            if self._size(name) == size:
                return
            self._obstore.put(self._store, name, source)
            if (found := self._size(name)) != size:
                raise UnavailableError(f"{self.url}/{path} has {found} bytes after an upload of {size}")

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(UnknownError), self._named(path) as name:
            self._obstore.delete(self._store, name)

    def size(self, path: str) -> int | None:
        """How many bytes the file has; None where there is none."""
        with self._named(path) as name:
            return self._size(name)

    def stream(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """The file from `offset` on, in chunks; raises UnknownError where there is none."""
        with self._named(path) as name:
            if offset:
                size = self._size(name)
                if size is None:
                    raise FileNotFoundError(name)
                if offset >= size:
                    return
            options: Any = {"range": {"offset": offset}} if offset else None
            for chunk in self._obstore.get(self._store, name, options=options).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def _size(self, name: str) -> int | None:
        try:
            return self._obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _named(self, path: str) -> Iterator[str]:
        try:
            yield checked(path)
        except FileNotFoundError:
            raise UnknownError(f"{self.url} has no {path}") from None
        except (OSError, self._obstore.exceptions.BaseError) as error:
            raise UnavailableError(f"{self.url}/{path}: {_first_line(error)}") from None


def checked(path: str) -> str:
    """A relative path that stays where it is; raises InputError for any other."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\0" in path or "\\" in path or any(p.startswith(".") for p in parts):
        raise InputError(f"{path[:200]!r} is not the name of a file in a store")
    return "/".join(parts)


def _link_or_copy(source: Path, target: Path) -> None:
    # Files of a store are never written to once they are named, so a link is as good as a copy.
    try:
        os.link(source, target)
        return
    except OSError:
        pass
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, CHUNK_BYTES)
        writing.flush()
        os.fsync(writing.fileno())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
