"""The ClientApp: hands what came to the updater, and says what it still lacks, or what became of the version.

What the SuperLink says is no more trusted than a mirror: only the version that a coordinator's signed update names is
taken, and the updater judges the bytes as if a stranger had brought them.
"""

from __future__ import annotations

import ctypes
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from bmoe.protocol.errors import BmoeError, MessageError, UnavailableError, UnknownError
from edge_agent.install_version import Received, install, progress
from edge_agent.wanted import read_result, read_wanted

FILES_MAX = 2048
PR_SET_PDEATHSIG = 1

app = ClientApp()


class Pieces(Received):
    """What one message brought: a blob that is not in it comes with another, so its lack is nobody's fault."""

    def stream(self, path: str, offset: int, limit: int) -> Iterator[bytes]:
        """As `Received` has it, but for blobs raises UnavailableError."""
        try:
            yield from super().stream(path, offset, limit)
        except UnknownError as error:
            if path.startswith("blobs/"):
                raise UnavailableError(str(error)) from None
            raise


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """The reply is {"state": "installed" | "refused" | "failed" | "lacking" | "unwanted", "reason": why, "have": {...}}."""
    # Whoever ends the SuperNode ends what it has in work: an install may die anywhere, and two at once are of no use.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        reply = _take(Path(str(context.node_config["state"])), message.content["release"])
    except (BmoeError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reply = {"state": "failed", "reason": str(error)[:300] or type(error).__name__}
    record = ConfigRecord({"json": json.dumps(reply)})
    return Message(RecordDict({"reply": record}), reply_to=message)


def _take(state: Path, record: Any) -> dict[str, Any]:
    wanted = read_wanted(state)
    if wanted is None or wanted.rollout.hex() != str(record["rollout"]):
        return {"state": "unwanted", "reason": "no coordinator has told us so"}
    done = read_result(state, wanted)
    if done is not None and done.state != "failed":
        return {"state": done.state, "reason": done.reason}
    sizes = _sizes(json.loads(str(record["sizes"])))
    paths, offsets, data = record["paths"], record["offsets"], record["data"]
    if not len(paths) == len(offsets) == len(data) <= FILES_MAX:
        raise MessageError(f"{len(paths)} paths, {len(offsets)} offsets and {len(data)} pieces came")
    files = dict(zip(map(str, paths), data, strict=True))
    starts = dict(zip(map(str, paths), map(int, offsets), strict=True))
    result = install(state, wanted, Pieces(files, starts))
    if result.state != "failed":
        return {"state": result.state, "reason": result.reason}
    have = progress(state, sizes)
    lacking = any(have[sha256] < size for sha256, size in sizes.items())
    return {"state": "lacking" if lacking else "failed", "reason": result.reason, "have": have}


def _sizes(values: Any) -> dict[str, int]:
    """The size of each blob by SHA-256 in hex, as the sender has it: it only serves to say how much is here."""
    if not isinstance(values, dict) or len(values) > FILES_MAX:
        raise MessageError(f"sizes must name at most {FILES_MAX} files")
    for sha256, size in values.items():
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef") or type(size) is not int or size < 0:
            raise MessageError(f"not a file's SHA-256 and size: {sha256[:80]!r}, {str(size)[:20]}")
    return values
