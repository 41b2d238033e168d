"""A site that releases: a ledger with four validators, a repository with its keys, and a board that updates from both.

The site is the peer: a test publishes, enters, spoils one thing, lets the board update, and looks at what it installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from onnx_models import FLOAT, graph, model, node, tensor, value
from receipt_ledger import Ledger

from bmoe.ledger.store import model_name
from bmoe.protocol.errors import BmoeError, UnavailableError, UnknownError
from bmoe.protocol.files import write_durably
from bmoe.storage.blobs import FolderStore, read_whole
from bmoe.storage.golden import write_golden
from bmoe.storage.installed import read_record
from bmoe.storage.manifest import Expert, Golden, Model, TensorSpec, manifest_digest, render_manifest
from bmoe.storage.origin import make_origin
from bmoe.storage.publication import publish
from bmoe.storage.repository import Repository
from bmoe.storage.repository_keys import KeyFolder
from bmoe.storage.targets import METADATA_BYTES, experts_and_gate, metadata_path
from bmoe.storage.update_ledger import Word
from bmoe.storage.updater import Installed, Refused, Trusted, Wanted, apply
from coordinator.identity.releases import release_entries

EPSILON, COLUMNS, CLASSES = 1e-5, 4, 3


def linear(
    seed: int, padding: int = 0, outputs: int = CLASSES, name: str = "y", columns: int = COLUMNS
) -> tuple[bytes, np.ndarray]:
    """y = x @ w in float32 [N, columns] -> [N, outputs], with some bytes of unused weights; and w."""
    draw = np.random.default_rng(seed)
    w = draw.uniform(-1, 1, (columns, outputs)).astype(np.float32)
    extra = [tensor("unused", draw.integers(0, 256, padding).astype(np.uint8))] if padding else []
    x, y = value("x", FLOAT, ["N", columns]), value(name, FLOAT, ["N", outputs])
    return model(graph([node("MatMul", ["x", "w"], [name])], [x], [y], [tensor("w", w), *extra])), w


def golden_of(w: np.ndarray, name: str = "y") -> bytes:
    """The golden pair of such a model."""
    x = np.random.default_rng(1).uniform(-1, 1, (2, len(w))).astype(np.float32)
    return write_golden({"x": x}, {name: x @ w})


class Site:
    """`reads` counts bytes streamed by path; `spoiled` gives other bytes, or an error, in place of a path's own."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.blobs, self.board = folder, folder / "blobs", folder / "board"
        for name in ("ledger", "blobs", "board"):
            (folder / name).mkdir()
        self.ledger = Ledger(folder / "ledger", validators=4)
        self.repository = Repository(FolderStore(folder / "repository"), KeyFolder(folder / "keys"), clock)
        self.repository.found()
        self.root = self.metadata("1.root")
        self.spoiled: dict[str, bytes | BmoeError] = {}
        self.reads: dict[str, int] = {}
        self.chunk, self.breaks_after = 4096, 0
        self.tested: list[str] = []
        self.size = self.ledger.seal()

    def metadata(self, name: str) -> bytes:
        """A metadata file of the repository."""
        return read_whole(self.repository.store, metadata_path(name), METADATA_BYTES)

    def expert(self, onnx: bytes, golden: bytes, name: str = "one", **changes: Any) -> Expert:
        """An expert's entry in the manifest, its files stored as blobs."""
        facts: dict[str, Any] = {
            "name": name, "file": f"{name}.onnx", "sha256": self.blob(onnx), "bytes": len(onnx), "opset": 17,
            "memory_mb": 64, "batch": True, "inputs": (TensorSpec("x", "float32", (None, COLUMNS)),),
            "outputs": (TensorSpec("y", "float32", (None, CLASSES), EPSILON),),
            "golden": Golden(f"{name}.npz", self.blob(golden), len(golden)),
        }  # fmt: skip
        return Expert(**{**facts, **changes})

    def blob(self, data: bytes) -> str:
        """Store bytes under their SHA-256."""
        digest = manifest_digest(data).hex()
        write_durably(self.blobs / digest, data)
        return digest

    def model(self, version: int, expert: Expert | None = None, name: str = "lines", **changes: Any) -> Model:
        """A model of one expert, other weights in each version."""
        if expert is None:
            onnx, w = linear(version)
            expert = self.expert(onnx, golden_of(w))
        facts: dict[str, Any] = {
            "format": 1, "name": name, "version": version, "licence": "CC0-1.0", "description": "", "top_k": 1,
            "combine": "weighted_sum", "labels": (), "gate": None, "experts": (expert,),
        }  # fmt: skip
        return Model(**{**facts, **changes})

    def release(self, model: Model, owner: str = "ada", enter: bool = True, draft: bool = False) -> Model:
        """Publish in the repository, and enter on the ledger."""
        manifest = render_manifest(model)
        publish(self.repository, owner, model, manifest, self.blobs, make_origin(model, {}), draft)
        if enter:
            self.enter(model, owner)
        return model

    def enter(self, model: Model, owner: str = "ada") -> None:
        """The ledger's entries of a version, under a checkpoint of all validators."""
        fleet = self.ledger.fleet
        port: Any = SimpleNamespace(ledger=fleet.ledger, epoch=fleet.epoch)
        digest = manifest_digest(render_manifest(model))
        applied = fleet.enter("registrar", *release_entries(fleet.registrar, port, model, digest, owner, fleet.now_ms))
        assert "model" in [event.kind for event in applied.events], applied.events
        self.size = self.ledger.seal()

    def read(self, path: str, limit: int) -> bytes:
        """A small file of the repository, or a receipt: the board's side of a fetch."""
        return b"".join(self.stream(path, 0, limit))

    def stream(self, path: str, offset: int, limit: int) -> Iterator[bytes]:
        """As a gateway streams it; breaks off after `breaks_after` bytes, if that is set."""
        data = self._bytes(path)[offset:]
        for start in range(0, len(data), self.chunk):
            chunk = data[start : start + self.chunk]
            if self.breaks_after and self.reads.get(path, 0) + len(chunk) > self.breaks_after:
                raise UnavailableError(f"{path}: the connection broke")
            self.reads[path] = self.reads.get(path, 0) + len(chunk)
            yield chunk

    def _bytes(self, path: str) -> bytes:
        spoiled = self.spoiled.get(path)
        if isinstance(spoiled, BmoeError):
            raise spoiled
        if spoiled is not None:
            return spoiled
        if path.startswith("receipts/"):
            kind, *name = path.split("/")[1:]
            key = bytes.fromhex(name[0]) if kind == "releases" else model_name(name[0], int(name[1]))
            return self.ledger.receipt(kind.removesuffix("s"), key, self.size).encode()
        if path.startswith("statements/"):
            raise UnknownError(f"no {path}")
        return read_whole(self.repository.store, path, 1 << 30)

    def trusted(self, **changes: Any) -> Trusted:
        """What the board takes on trust."""
        facts: dict[str, Any] = {"file_bytes": 1 << 20, "memory_mb": 256, "word": Word(self.ledger.fleet.trust)}
        return Trusted(self.root, **{**facts, **changes})

    def update(
        self, version: int, at: Callable[[str], None] = lambda step: None, name: str = "lines", **changes: Any
    ) -> Installed | Refused:
        """The board updates; its self-test passes, and notes what it tested."""
        test = changes.pop("self_test", lambda part, path, golden: self.tested.append(part.name))
        return apply(self, self.board, Wanted(name, version), self.trusted(**changes), test, at)

    def installed(self, name: str = "lines") -> int:
        """The version in use on the board, whose experts are all there and whole; 0 for none."""
        record = read_record(self.board, name)
        if record is None:
            return 0
        for part in record.current.parts:
            data = (self.board / "experts" / f"{part}.onnx").read_bytes()
            assert manifest_digest(data).hex() == part
            assert (self.board / "experts" / f"{part}.release").is_file()
        return record.current.version

    def stays(self, reason: str, version: int = 2, installed: int = 1, **changes: Any) -> Refused:
        """An update that is refused, for that reason: what was installed stays, and works."""
        found = self.update(version, **changes)
        assert isinstance(found, Refused), found
        assert reason in found.reason, found.reason
        assert "\n" not in found.reason and len(found.reason) <= 400
        assert self.installed() == installed
        return found


def parts_of(model: Model) -> list[str]:
    """The SHA-256 of each part of a model, in hex."""
    return [part.sha256 for part in experts_and_gate(model)]
