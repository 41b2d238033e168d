"""For boards that the maker's own program flashes (NVIDIA Jetson): a tree that is laid over its root file system.

Nothing is written to a disk, the QSPI flash or an EEPROM. The same tree installs on a board that runs already.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

from bmoe.protocol.errors import ConfigError
from coordinator.flash.first_boot import agent_folder, key_file, template
from coordinator.flash.seed import Seed

PLACE = "var/lib/bmoe-first-boot"  # on the root file system: the agent's own directory is made by the installer
SECRET = ("token", ".nmconnection")
SERVICE = "etc/systemd/system/bmoe-first-boot.service"


def overlay_files(seed: Seed) -> dict[str, bytes]:
    """Path below the root file system -> content, wheels not among them."""
    files = {f"{PLACE}/{path}": content for path, content in agent_folder(seed, f"/{PLACE}", "").items()}
    files[SERVICE] = files.pop(f"{PLACE}/bmoe/bmoe-first-boot.service")
    if seed.ssh_key:
        files[f"{PLACE}/bmoe/authorized_keys"] = f"{seed.ssh_key}\n".encode()
    if seed.hostname:
        files["etc/hostname"] = f"{seed.hostname}\n".encode()
    if seed.timezone:
        files["etc/timezone"] = f"{seed.timezone}\n".encode()
    if seed.wifi:
        files["etc/NetworkManager/system-connections/bmoe-wifi.nmconnection"] = key_file(seed.wifi).encode()
    return files


def overlay_links(seed: Seed) -> dict[str, str]:
    """Symbolic links of the tree."""
    links = {"etc/systemd/system/multi-user.target.wants/bmoe-first-boot.service": "../bmoe-first-boot.service"}
    if seed.timezone:
        links["etc/localtime"] = f"/usr/share/zoneinfo/{seed.timezone}"
    return links


def write_overlay(folder: Path, seed: Seed) -> list[Path]:
    """Write overlay.tar, apply.sh and install-here.sh into a new folder; raises ConfigError where it is there already."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} is there already: nothing is overwritten") from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from None
    try:
        return _filled(folder, seed)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half of it would be taken for the whole, and a token is in it
        raise


def _filled(folder: Path, seed: Seed) -> list[Path]:
    archive = folder / "overlay.tar"
    with os.fdopen(os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        _write_tar(file, seed)
        file.flush()
        os.fsync(file.fileno())
    made = [archive]
    for name in ("apply.sh", "install-here.sh"):
        path = folder / name
        path.write_text(template(f"jetson-{name}", PLACE=f"/{PLACE}"), encoding="utf-8")
        path.chmod(0o755)
        made.append(path)
    return made


def _write_tar(file: object, seed: Seed) -> None:
    """Owned by root whoever makes it; secrets readable by root alone."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for name in (f"{PLACE}", f"{PLACE}/bmoe", f"{PLACE}/bmoe/wheels"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o700, seed.issued_s
            tar.addfile(entry)
        for path, content in sorted(overlay_files(seed).items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mtime = len(content), seed.issued_s
            entry.mode = 0o600 if path.endswith(SECRET) else 0o644
            tar.addfile(entry, BytesIO(content))
        for path, target in sorted(overlay_links(seed).items()):
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname, entry.mtime = tarfile.SYMTYPE, target, seed.issued_s
            tar.addfile(entry)
        for wheel in seed.wheels:
            entry = tarfile.TarInfo(f"{PLACE}/bmoe/wheels/{wheel.name}")
            entry.size, entry.mtime, entry.mode = wheel.stat().st_size, seed.issued_s, 0o644
            with wheel.open("rb") as content_file:
                tar.addfile(entry, content_file)
