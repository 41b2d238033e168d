"""Where an update's bytes come from: a gateway's HTTPS, or what Flower brought. Nothing that a source gives is believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from bmoe.protocol.errors import BmoeError, RefusedError, UnknownError

BASE = "repository:///"


class Source(Protocol):
    """Files of a repository by path, as `bmoe.storage.targets` names them.

    Both calls raise UnknownError (or RefusedError) for a file that is not to be had, UnavailableError for one that may be
    had later.
    """

    def read(self, path: str, limit: int) -> bytes:
        """A small file; raises LimitError or MessageError for more than `limit` bytes."""

    def stream(self, path: str, offset: int, limit: int) -> Iterator[bytes]:
        """The file from `offset` on, in chunks; it may end early, what came is kept and the rest asked for next time."""


class Received:
    """Files that were brought: whole ones, or of a large one whatever has arrived, from an offset on."""

    def __init__(self, files: Mapping[str, bytes], starts: Mapping[str, int] | None = None) -> None:
        """`starts` gives, for a file that is only the rest of one, at which offset it begins."""
        self._files, self._starts = files, starts or {}

    def read(self, path: str, limit: int) -> bytes:
        """A file that was brought whole; raises UnknownError."""
        return b"".join(self.stream(path, 0, limit))

    def stream(self, path: str, offset: int, limit: int) -> Iterator[bytes]:
        """What was brought from `offset` on; raises UnknownError where that is nothing."""
        data, start = self._files.get(path), self._starts.get(path, 0)
        if data is None or offset < start:
            raise UnknownError(f"{path} was not brought" + (f" from byte {offset} on" if data is not None else ""))
        if len(data) + start > limit:
            raise RefusedError(f"{path} has {len(data) + start} bytes, {limit} are expected")
        yield data[offset - start :]


class MetadataFetcher(FetcherInterface):
    """python-tuf's way to metadata, over a source. It never fetches a target: those are resumed, see `download`."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, limit

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(BASE)
        try:
            return iter([self._source.read(path, self._limit)])
        except (UnknownError, RefusedError) as error:
            raise DownloadHTTPError(f"{path}: {error}", 404) from error
        except BmoeError as error:
            raise DownloadError(f"{path}: {error}") from error
