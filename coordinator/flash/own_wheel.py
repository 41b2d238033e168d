"""bmoe's own wheel, made of the code that runs here: what a card brings itself, for no package index is asked for it.

Whoever enters the name `bmoe` at an index that a board reads would otherwise run as root on every board.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path

import bmoe
from bmoe.protocol.errors import ConfigError
from bmoe.storage.packaged import packaged

PACKAGES = ("bmoe", "coordinator", "edge_agent")
DATA = (  # in a checkout, where the packages do not hold it yet; as setup.py has it
    "models/*/model.json", "models/*/origin.json", "models/*/*.onnx", "models/*/*.npz", "models/*/MODEL.md",
    "firmware_configs/**/*",
)  # fmt: skip
WHEEL = "Wheel-Version: 1.0\nGenerator: bmoe flash\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@functools.cache
def own_wheel() -> tuple[str, bytes]:
    """Its file name and content, the same bytes for the same code. Raises ConfigError where bmoe is not installed.

    Source: the binary distribution format of PyPA's specifications.
    """
    try:
        installed = distribution("bmoe")
    except PackageNotFoundError:
        raise ConfigError("bmoe is not installed here, only lying about: pip install it, or give --wheels") from None
    if installed.version != bmoe.__version__:
        raise ConfigError(f"bmoe is installed as {installed.version}, what runs is {bmoe.__version__}: install it anew")
    stem = f"bmoe-{installed.version.replace('-', '_')}"
    files = _code() | _metadata(installed, f"{stem}.dist-info")
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in sorted(files.items()))
    files[f"{stem}.dist-info/RECORD"] = f"{record}{stem}.dist-info/RECORD,,\n".encode()
    made = BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():  # RECORD last, as the specification advises
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return f"{stem}-py3-none-any.whl", made.getvalue()


def _code() -> dict[str, bytes]:
    root = Path(bmoe.__file__).resolve().parents[1]
    found = {path.relative_to(root).as_posix(): path for name in PACKAGES for path in _files(root / name, "**/*")}
    if not (root / "bmoe" / "_data").is_dir():
        checkout = packaged("firmware_configs", "boards").parents[1]
        for path in (path for pattern in DATA for path in _files(checkout, pattern)):
            found[f"bmoe/_data/{path.relative_to(checkout).as_posix()}"] = path
    return {name: path.read_bytes() for name, path in sorted(found.items())}


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if path.is_file() and "__pycache__" not in path.parts]


def _metadata(installed: Distribution, folder: str) -> dict[str, bytes]:
    # A checkout that was installed in place and comes first on the path has its own under an older name.
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO")
    if not metadata:
        raise ConfigError("bmoe's installation here has no metadata: pip install it anew, or give --wheels")
    texts = {"WHEEL": WHEEL, "METADATA": metadata, "entry_points.txt": installed.read_text("entry_points.txt")}
    return {f"{folder}/{name}": text.encode() for name, text in texts.items() if text}


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
