"""A Debian arm64 root file system with systemd, laid out as vendors lay out theirs: unpacked natively, no root.

No maintainer script runs. What they would have done and these tests need is done here, file by file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.emulate import apt

RELEASE, PYTHON = "bookworm", "3.11"
PACKAGES = (
    "?essential", "systemd-sysv", "udev", "dbus", "cloud-init", "iproute2", "netbase", "kmod", "mount", "login", "passwd",
    "libstdc++6", "python3", "python3-venv", "ca-certificates", "busybox-static", "linux-image-arm64", "tzdata",
    "openssh-server",
)  # fmt: skip
MODULES = (
    "virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "virtio_net",
    "virtio_rng", "virtio_console", "i6300esb",
)  # fmt: skip
PROBE = Path(__file__).with_name("probe.py")
# Groups and users that packages make when they are configured; the rest systemd-sysusers makes at the first boot.
USERS = {"messagebus": 990, "systemd-network": 998, "systemd-resolve": 997, "systemd-timesync": 996, "sshd": 995}
GROUPS = {"render": 989, "sgx": 988, "systemd-journal": 987}
FILES = {
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/machine-id": "",
    "etc/nsswitch.conf": "passwd: files systemd\ngroup: files systemd\nshadow: files\nhosts: files dns\n",
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n",
    # A door for the test, which a real image has not.
    "etc/systemd/system/test-probe.service": (
        "[Unit]\nDescription=Commands from the test\nDefaultDependencies=no\nAfter=local-fs.target\n\n"
        "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/test-probe.py\nRestart=always\n"
    ),
}
ENABLED = {
    "multi-user.target.wants": ("systemd-networkd.service", "/etc/systemd/system/test-probe.service"),
    "sockets.target.wants": ("systemd-networkd.socket",),
}


@dataclass(frozen=True)
class Layout:
    """What differs from vendor to vendor: the boot partition's label, how it is mounted, files on it and in the root, units,
    people.

    `kernel` and `initrd` are their names on the boot partition.
    """

    name: str
    label: str
    mounted: str
    kernel: str
    initrd: str
    boot: Mapping[str, str]
    files: Mapping[str, str]
    enabled: Mapping[str, tuple[str, ...]]
    people: Mapping[str, int]


DEBIAN = Layout(
    "debian", "CIDATA", "defaults,nofail", "vmlinuz", "initrd",
    boot={},
    # As Debian's own images for one kind of place have it: where the seed may be, and nothing that has no tools here.
    files={
        "etc/cloud/cloud.cfg.d/90_this_image.cfg": (
            "datasource_list: [NoCloud, None]\n"
            "cloud_init_modules: [bootcmd, write-files, set_hostname, update_hostname, users-groups]\n"
            "cloud_config_modules: [timezone, runcmd]\n"
            "cloud_final_modules: [scripts-user]\n"
        )
    },
    enabled={
        "cloud-init.target.wants": tuple(
            f"{name}.service" for name in ("cloud-init-local", "cloud-init", "cloud-config", "cloud-final")
        )
    },
    people={},
)  # fmt: skip
# As Bookworm and the first Trixie image have it, behind their own first stage, which resizes and takes its init= out of
# the command line: no cloud-init, a first user, and a command line on the card that the firmware hands to the kernel.
RASPBERRY_PI_OS = Layout(
    "raspberry-pi-os", "bootfs", "defaults", "kernel8.img", "initramfs8",
    boot={
        "cmdline.txt": (
            "console=ttyAMA0 root=/dev/vda2 rootfstype=ext4 fsck.repair=yes rootwait rw panic=-1 systemd.show_status=1\n"
        ),
        "config.txt": "arm_64bit=1\nauto_initramfs=1\n",
    },
    files={"etc/cloud/cloud-init.disabled": "", "home/pi/.profile": ""},
    enabled={},
    people={"pi": 1000},
)  # fmt: skip
LAYOUTS = (DEBIAN, RASPBERRY_PI_OS)


def make_root(folder: Path) -> tuple[Path, Path, Path]:
    """Under `folder`: (root, kernel, initrd); the root as yet of no vendor."""
    archive = apt.Archive(folder / "apt", apt.machine_sources(RELEASE), ("arm64",))
    archive.update()
    debs = archive.fetch(PACKAGES)
    kernel = next(deb for deb in debs if re.match(r"linux-image-\d", deb.name))
    root, tree = folder / "root", folder / "kernel"
    apt.unpack([deb for deb in debs if deb != kernel], root)
    tree.mkdir()
    subprocess.run(["dpkg-deb", "-x", str(kernel), str(tree)], check=True)
    # cloud-init starts Python four times: bytecode made here saves a minute of emulation.
    subprocess.run(
        [sys.executable, "-I", "-m", "compileall", "-q", "-j", "0", "-s", str(root), "-p", "/",
         str(root / "usr/lib/python3"), str(root / f"usr/lib/python{PYTHON}")],
        capture_output=True, check=False,
    )  # fmt: skip
    image = next((tree / "boot").glob("vmlinuz-*"))
    initrd = folder / "initrd"
    initrd.write_bytes(make_initrd(tree, root / "usr" / "bin" / "busybox"))
    return root, image, initrd


def configure(base: Path, layout: Layout, root: Path) -> None:
    """A vendor's root, of links to the files of `base`; with what maintainer scripts would have done."""
    shutil.copytree(base, root, symlinks=True, copy_function=os.link)
    _users(root, layout.people)
    boot = f"LABEL={layout.label} /boot/firmware vfat {layout.mounted} 0 2\n"
    probe = {"usr/local/lib/test-probe.py": PROBE.read_text(encoding="utf-8")}
    fstab = {"etc/fstab": f"LABEL=rootfs / ext4 defaults 0 1\n{boot}"}
    for name, text in {**FILES, **fstab, **probe, **layout.files}.items():
        _put(root / name, text)
    for name, number in layout.people.items():
        for path in (root / "home" / name, *(root / "home" / name).iterdir()):
            os.chown(path, number, number)
    units = root / "etc" / "systemd" / "system"
    for target, services in {**ENABLED, **layout.enabled}.items():
        (units / target).mkdir(parents=True, exist_ok=True)
        for service in services:
            path = service if service.startswith("/") else f"/lib/systemd/system/{service}"
            (units / target / Path(path).name).symlink_to(path)
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    for name, target in (("usr/bin/sh", "dash"), ("usr/bin/awk", "mawk"), ("usr/bin/which", "which.debianutils")):
        if not (root / name).is_symlink() and not (root / name).exists():
            (root / name).symlink_to(target)
    for name in ("boot/firmware", "proc", "sys", "dev", "run", "tmp", "root", "var/lib", "var/log"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)


def _put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # or the other vendors' is written too
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _users(root: Path, people: Mapping[str, int]) -> None:
    base = root / "usr" / "share" / "base-passwd"
    passwd = re.sub(r"^root:[^:]*:", "root:x:", (base / "passwd.master").read_text(), flags=re.M)
    group = (base / "group.master").read_text()
    for name, number in USERS.items():
        passwd += f"{name}:x:{number}:{number}::/:/usr/sbin/nologin\n"
    for name, number in people.items():
        passwd += f"{name}:x:{number}:{number}::/home/{name}:/bin/bash\n"
    for name, number in {**USERS, **GROUPS, **people}.items():
        group += f"{name}:x:{number}:\n"
    shadow = "".join(f"{line.split(':')[0]}:*:19000:0:99999:7:::\n" for line in passwd.splitlines())
    gshadow = "".join(f"{line.split(':')[0]}:*::\n" for line in group.splitlines())
    for name, text, mode in (
        ("passwd", passwd, 0o644),
        ("group", group, 0o644),
        ("shadow", shadow, 0o640),
        ("gshadow", gshadow, 0o640),
    ):
        _put(root / "etc" / name, text, mode)


INIT = """#!/bin/sh
export PATH=/bin
mount -t devtmpfs d /dev; mount -t proc p /proc; mount -t sysfs s /sys
while read -r m; do insmod /modules/$m || echo "insmod $m failed"; done < /modules/order
i=0; while [ ! -e /dev/vda2 ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 -o rw /dev/vda2 /new || exec sh
umount /proc /sys; mount --move /dev /new/dev
exec switch_root /new /sbin/init
"""
APPLETS = ("sh", "mount", "umount", "insmod", "sleep", "echo", "switch_root")


def make_initrd(tree: Path, busybox: Path) -> bytes:
    """Busybox, the modules of a virtual machine's devices, and a script that goes on to the root file system."""
    files = {path.stem.replace("-", "_"): path for path in tree.glob("lib/modules/**/*.ko")}
    order: list[str] = []
    for name in MODULES:
        _with_dependencies(name, files, order)
    archive = Cpio()
    for folder in ("bin", "dev", "proc", "sys", "new", "modules"):
        archive.folder(folder)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    archive.file("init", INIT.encode(), 0o755)
    archive.file("modules/order", "".join(f"{name}.ko\n" for name in order).encode())
    for name in order:
        archive.file(f"modules/{name}.ko", files[name].read_bytes())
    return archive.done()


def _with_dependencies(name: str, files: dict[str, Path], order: list[str]) -> None:
    if name in order or name not in files:  # what is no file is built into the kernel
        return
    found = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
    for needed in filter(None, (found[1].decode() if found else "").split(",")):
        _with_dependencies(needed.replace("-", "_"), files, order)
    order.append(name)


class Cpio:
    """An archive in the form "newc", as the kernel takes it (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0

    def folder(self, name: str) -> None:
        """A folder."""
        self._entry(name, b"", 0o040755)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._entry(name, target.encode(), 0o120777)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A plain file."""
        self._entry(name, data, 0o100000 | mode)

    def done(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", b"", 0)
        return bytes(self._data)

    def _entry(self, name: str, data: bytes, mode: int) -> None:
        self._count += 1
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        self._data += b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
        self._pad()
        self._data += data
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)
