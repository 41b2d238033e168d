"""The files by which a system's first boot installs the agent: firstrun.sh, or cloud-init's, and the folder bmoe/. Pure.

Sources: systemd-run-generator(8) for systemd.run=; cloud-init's NoCloud and netplan references; NetworkManager's keyfile.
"""

from __future__ import annotations

import json
import re
import shlex
import time
import uuid
from collections.abc import Callable

from bmoe.protocol.errors import ImageError
from bmoe.storage.packaged import packaged
from coordinator.flash.seed import Seed, Wifi

Files = dict[str, bytes]
Existing = Callable[[str], "bytes | None"]
CMDLINES = ("cmdline.txt", "current/cmdline.txt")  # Ubuntu since 25.10 boots from the second


def files_for(method: str, seed: Seed, label: str, existing: Existing) -> Files:
    """Path on the boot partition -> new content, by method ("firstrun" or "cloud-init"), without `seed.wheels`.

    `existing` gives what is there now. Raises ImageError where a file that must be changed cannot be.
    """
    files = agent_folder(seed, seed.board.image.boot_mount, label)
    return files | {"firstrun": _firstrun, "cloud-init": _cloud_init}[method](seed, label, existing)


def agent_folder(seed: Seed, mount: str, label: str) -> Files:
    """The folder `bmoe/`: what `bmoe-agent install --from` takes, and the script that calls it."""
    settings = seed.board.agent.model_dump() | {"providers": list(seed.board.onnxruntime.providers)}
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in sorted(settings.items()))
    files = {
        "bmoe/token": seed.token.text() + "\n",
        "bmoe/agent.toml": f"# Written by bmoe flash for {seed.board.title}.\n{toml}",
        "bmoe/issued_at": f"{seed.issued_s}\n",
        "bmoe/install.sh": template("install.sh", BOARD=seed.board.name),
        "bmoe/bmoe-first-boot.service": template(
            "bmoe-first-boot.service", FOLDER=f"{mount}/bmoe", MOUNT=mount, LABEL=label or "none"
        ),
    }
    if seed.name:
        files["bmoe/name"] = f"{seed.name}\n"
    own = {f"bmoe/wheels/{seed.own[0]}": seed.own[1]} if seed.own else {}
    return {path: text.encode() for path, text in files.items()} | own


def template(name: str, **values: str) -> str:
    """A file of firmware_configs/first_boot/ with its @NAMES@ filled in."""
    text = (packaged("firmware_configs", "first_boot") / name).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], text)


def key_file(wifi: Wifi) -> str:
    """NetworkManager's file for a network. The name's bytes in numbers: among its characters may be some that mean more."""
    ssid = "".join(f"{byte};" for byte in wifi.ssid.encode())
    security = f"[wifi-security]\nkey-mgmt=wpa-psk\npsk={wifi.psk}\n\n" if wifi.psk else ""
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"bmoe-wifi:{wifi.ssid}")
    return (
        f"[connection]\nid=bmoe-wifi\nuuid={identity}\ntype=wifi\n\n[wifi]\nmode=infrastructure\nssid={ssid}\n\n"
        f"{security}[ipv4]\nmethod=auto\n\n[ipv6]\nmethod=auto\n"
    )


def _firstrun(seed: Seed, label: str, existing: Existing) -> Files:
    mount = seed.board.image.boot_mount
    words = [
        ("systemd.run=", f"{mount}/firstrun.sh"),
        ("systemd.run_success_action=", "reboot"),
        ("systemd.unit=", "kernel-command-line.target"),
    ]
    if seed.wifi:
        words.append(("cfg80211.ieee80211_regdom=", seed.wifi.country))
    script = template(
        "firstrun.sh",
        MOUNT=shlex.quote(mount),
        HOSTNAME=shlex.quote(seed.hostname),
        TIMEZONE=shlex.quote(seed.timezone),
        COUNTRY=shlex.quote(seed.wifi.country if seed.wifi else ""),
        SSH="yes" if seed.ssh_key else "no",
    )
    files = _command_lines(existing, words) | {"firstrun.sh": script.encode()}
    if not any(path in files for path in CMDLINES):
        raise ImageError("the boot partition has no cmdline.txt to start firstrun.sh from")
    if seed.ssh_key:
        files["bmoe/authorized_keys"] = f"{seed.ssh_key}\n".encode()
    if seed.wifi:
        files["bmoe/wifi.nmconnection"] = key_file(seed.wifi).encode()
    return files


def _cloud_init(seed: Seed, label: str, existing: Existing) -> Files:
    identity = f"bmoe-{seed.issued_s}-{seed.token.token.hex()[:8]}"  # a fresh one, or an old card's is thought set up
    words = [("ds=nocloud", f";i={identity}")]
    if seed.wifi:
        words.append(("cfg80211.ieee80211_regdom=", seed.wifi.country))
    files = _command_lines(existing, words) | {
        "user-data": _user_data(seed, label).encode(),
        "meta-data": f"instance-id: {identity}\n".encode(),
    }
    if seed.wifi:
        files["network-config"] = _network_config(seed.wifi).encode()
    return files


def _user_data(seed: Seed, label: str) -> str:
    """YAML, its values spelled as JSON, which YAML takes as they are."""
    mount = seed.board.image.boot_mount
    lines = [
        "#cloud-config",
        "# Written by bmoe flash. The token is not here: it is in bmoe/token until the board has joined.",
    ]
    if seed.hostname:
        lines += [f"hostname: {json.dumps(seed.hostname)}", "manage_etc_hosts: true"]
    if seed.timezone:
        lines.append(f"timezone: {json.dumps(seed.timezone)}")
    commands = []
    if seed.ssh_key:
        lines += ["ssh_pwauth: false", "ssh_authorized_keys:", f"  - {json.dumps(seed.ssh_key)}"]
        commands.append(["systemctl", "enable", "--now", "ssh"])
    there = f"test -e {mount}/bmoe/install.sh || {{ mkdir -p {mount} && mount -L {label or 'CIDATA'} {mount}; }}"
    commands.append(["sh", "-c", f"{there}; sh {mount}/bmoe/install.sh --enable --now"])
    lines += ["runcmd:", *(f"  - {json.dumps(command)}" for command in commands)]
    return "\n".join(lines) + "\n"


def _network_config(wifi: Wifi) -> str:
    point = {"password": wifi.psk} if wifi.psk else {}
    wlan = {
        "dhcp4": True, "optional": True, "regulatory-domain": wifi.country, "access-points": {wifi.ssid: point},
    }  # fmt: skip
    config = {"version": 2, "ethernets": {"eth0": {"dhcp4": True, "optional": True}}, "wifis": {"wlan0": wlan}}
    return f"# Written by bmoe flash.\nnetwork: {json.dumps(config, ensure_ascii=False)}\n"


def _command_lines(existing: Existing, words: list[tuple[str, str]]) -> Files:
    """Each command line that is there, with `words` in place of those of the same begin. It stays one line."""
    found: Files = {}
    for path in CMDLINES:
        content = existing(path)
        if content is None:
            continue
        text = content.decode("utf-8", "replace").strip("\0\r\n ")
        if "\n" in text or len(text) > 3000 or not text.isprintable():
            raise ImageError(f"{path} of the boot partition is not one line of text")
        kept = [word for word in text.split(" ") if word and not word.startswith(tuple(begin for begin, _ in words))]
        found[path] = (" ".join([*kept, *(begin + rest for begin, rest in words)]) + "\n").encode()
    return found


def fat_stamp(seconds: int) -> tuple[int, int]:
    """FAT's date and time of a moment, UTC."""
    moment = time.gmtime(max(seconds, 315_532_800))  # FAT's time begins in 1980
    date = (moment.tm_year - 1980) << 9 | moment.tm_mon << 5 | moment.tm_mday
    return date, moment.tm_hour << 11 | moment.tm_min << 5 | moment.tm_sec // 2
