"""Installing into a tree: what stands where, what is refused in one line, and that no copy of the token is left."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.join_token import JoinToken
from bmoe.storage.packaged import packaged
from edge_agent import cli
from edge_agent import install as module
from edge_agent.boot_token import take_token
from edge_agent.config import load_settings
from edge_agent.install import install, profile

SECRET = JoinToken("https://192.168.1.10:8443", b"t" * 8, b"s" * 16, b"p" * 32).text()
SENSOR = "etc/systemd/system/bmoe-source.service.d/50-sensor.conf"
COPIES = {
    "boot/firmware/user-data": f"#cloud-config\nruncmd:\n  - [bmoe-agent, join, {SECRET}]\n",
    "boot/firmware/firstrun.sh": f"#!/bin/sh\nTOKEN={SECRET}\n",
    "var/lib/cloud/instances/pi/user-data.txt": f"token: '{SECRET}'\n",
    "var/lib/cloud/instances/pi/obj.pkl": f"\x80\x04pickle {SECRET}.",
    "run/cloud-init/instance-data-sensitive.json": f'{{"userdata": "{SECRET}"}}',
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image's tree as it is at the first boot."""
    root = tmp_path / "root"
    boot = root / "boot/firmware/bmoe"
    boot.mkdir(parents=True)
    (boot / "token").write_text(SECRET + "\n")
    (boot / "name").write_text("kitchen-pi\n")
    (boot / "agent.toml").write_text("queue_limit = 8\n")
    (boot / "issued_at").write_text("1790000000\n")
    (root / "etc").mkdir()
    (root / "etc/group").write_text("root:x:0:\nvideo:x:44:\ndialout:x:20:\n")
    for name, text in COPIES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def installed(root: Path, board: str | None = None) -> list[str]:
    return list(install(root, source=root / "boot/firmware/bmoe", board=board, program=None))


def test_a_first_boots_folder_becomes_state_units_and_nothing_else(root: Path) -> None:
    installed(root)
    state = root / "var/lib/bmoe-agent"
    assert (state / "join/token").read_text() == SECRET + "\n" and (state / "join/name").read_text() == "kitchen-pi\n"
    assert (state / "clock").read_text() == "1790000000\n"
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "join/token").stat().st_mode & 0o777 == 0o600
    assert load_settings(state=state).queue_limit == 8
    unit = (root / "etc/systemd/system/bmoe-agent.service").read_text()
    assert "\nExecStart=/opt/bmoe/bin/bmoe-agent run\n" in unit and "Type=notify" in unit
    for name in ("bmoe-agent.service", "bmoe-source.service"):
        link = root / "etc/systemd/system/multi-user.target.wants" / name
        assert link.is_symlink() and link.resolve() == (root / "etc/systemd/system" / name).resolve()


def test_no_copy_of_the_token_is_left_and_other_bytes_are_untouched(root: Path) -> None:
    installed(root)
    assert not (root / "boot/firmware/bmoe/token").exists()
    for name, text in COPIES.items():
        assert (root / name).read_text() == text.replace(SECRET, "x" * len(SECRET))
    left = [path for path in root.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert left == [root / "var/lib/bmoe-agent/join/token"]


def test_doing_it_again_changes_nothing_and_keeps_own_settings(root: Path) -> None:
    installed(root)
    (root / "boot/firmware/bmoe/agent.toml").unlink()
    (root / "var/lib/bmoe-agent/agent.toml").write_text("queue_limit = 3\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    installed(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_settings_that_are_damaged_are_replaced_by_those_of_the_card(root: Path) -> None:
    state = root / "var/lib/bmoe-agent"
    state.mkdir(parents=True)
    (state / "agent.toml").write_text("queue_limit = [")
    (root / "boot/firmware/bmoe/agent.toml").write_text('temperature_file = "/sys/\\u007f\\\\\\"\\u0001é"\n')
    installed(root)
    assert load_settings(state=state).temperature_file == '/sys/\x7f\\"\x01é'


def test_another_profile_leaves_nothing_of_the_one_before(root: Path) -> None:
    units = root / "etc/systemd"
    installed(root, "jetson-orin-nano")
    list(install(root, source=None, board=None, program=None, sensor=True))
    assert not (units / "system/bmoe-agent.service.d/50-gpu.conf").exists(), "a wider sandbox than the board needs"
    assert not (units / "system.conf.d/50-bmoe-watchdog.conf").exists()
    assert "DeviceAllow=char-i2c rw" in (units / "system/bmoe-source.service.d/50-sensor.conf").read_text()
    installed(root, "rpi4")
    assert not list((units / "system").glob("*.d/*"))
    assert "RuntimeWatchdogSec=14" in (units / "system.conf.d/50-bmoe-watchdog.conf").read_text()


def test_beside_the_debian_package_only_what_it_has_not_is_written(root: Path) -> None:
    """A copy in /etc would hide the units of each later package."""
    packaged_unit = root / "lib/systemd/system/bmoe-agent.service"
    packaged_unit.parent.mkdir(parents=True)
    packaged_unit.write_text("[Service]\n")
    installed(root, "rpi4")
    program = Path("/usr/bin/bmoe-agent")
    list(install(root, source=None, board="jetson-orin-nano", program=program))
    units = root / "etc/systemd/system"
    assert sorted(path.name for path in units.iterdir()) == ["bmoe-agent.service.d", "multi-user.target.wants"]


def test_links_of_an_images_tree_do_not_lead_out_of_it(root: Path, tmp_path: Path) -> None:
    """Written as root on the machine that prepares the image: its maker may have meant that machine's own files."""
    for place in ("etc/systemd/system", "var/lib/bmoe-agent", "etc/systemd/system/multi-user.target.wants"):
        image, outside = tmp_path / place.replace("/", "-"), tmp_path / f"host-{place.replace('/', '-')}"
        shutil.copytree(root, image)
        outside.mkdir()
        (image / place).parent.mkdir(parents=True, exist_ok=True)
        (image / place).symlink_to(outside)
        with pytest.raises(ConfigError, match="leads out of"):
            list(install(image, source=image / "boot/firmware/bmoe", board=None, program=None))
        assert not list(outside.iterdir())


def test_a_program_that_lies_in_a_home_by_way_of_links_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment in /opt whose Python is pyenv's, in /root: the service could not begin it."""
    program, home = tmp_path / "venv/bin/bmoe-agent", tmp_path / "home"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    home.mkdir()
    (program.parent / "python").symlink_to(home / "python3.11")
    monkeypatch.setattr(module, "HIDDEN", (f"{home}/",))
    with pytest.raises(ConfigError, match=rf"no sight of {home}/python3.11: .* a Python that all can run"):
        module._check_program(program, Path("/"))


def test_a_board_that_needs_none_is_installed_without_a_token(tmp_path: Path) -> None:
    steps = list(install(tmp_path, source=None, board=None, program=None))
    assert not [step for step in steps if step.startswith("token")] and take_token(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("token", "hello", "token: a join token begins with"),
        ("token", SECRET[:-4], "token"),
        ("agent.toml", "queue_limt = 8\n", "queue_limt"),
        ("agent.toml", "queue_limit = [", "agent.toml cannot be read"),
        ("agent.toml", 'state = "/etc"\n', "agent.toml says state: of a service, the unit says that"),
        ("agent.toml", "a = " + "[" * 5000, "agent.toml cannot be read"),
        ("issued_at", "yesterday", "expected seconds since 1970"),
        ("issued_at", "9" * 20, "expected seconds since 1970"),
    ],
)
def test_what_is_wrong_on_the_card_is_one_line_and_leaves_the_token(
    root: Path, name: str, text: str, says: str
) -> None:
    (root / "boot/firmware/bmoe" / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        installed(root)
    assert (root / "boot/firmware/bmoe/token").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--board", "commodore-64"), "there is no board 'commodore-64'; there are: "),
        (("--program", "/home/pi/venv/bin/bmoe-agent"), "the service has no sight of /home/pi"),
        (("--program", "bin/bmoe-agent"), "absolute path"),
        (("--program", "/opt/b moe/bin/bmoe-agent"), "absolute path"),
        (("--program", "/opt/%h/bin/bmoe-agent"), "absolute path"),
    ],
)
def test_a_wrong_command_is_one_line(
    root: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(["install", "--root", str(root), *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_token_put_on_the_card_later_is_taken_by_itself(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["install", "--root", str(root), "--token"]) == 0
    assert "token taken from" in capsys.readouterr().out
    assert (root / "var/lib/bmoe-agent/join/token").exists() and not (root / "etc/systemd").exists()
    assert cli.run_command(["install", "--root", str(root), "--token"]) == 0
    assert "no token" in capsys.readouterr().out


@pytest.mark.parametrize("board", sorted(path.stem for path in packaged("firmware_configs", "boards").glob("*.toml")))
def test_each_boards_profile_becomes_settings_and_units_that_keep_to_their_exposure(
    root: Path, board: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = profile(board)
    installed(root, board)
    settings = load_settings(state=root / "var/lib/bmoe-agent")
    assert settings.memory_mb == known["agent"]["memory_mb"] and settings.queue_limit == 8, "what was given counts"
    assert list(settings.providers) == known["onnxruntime"]["providers"]
    drop_in = root / "etc/systemd/system/bmoe-agent.service.d/50-gpu.conf"
    assert drop_in.exists() == (known["systemd"] == "gpu")
    if drop_in.exists():
        groups = re.findall(r"(?m)^SupplementaryGroups=(.*)$", drop_in.read_text())
        assert groups == ["video"], "the unit would not start with a group that is not there"
    watchdog = root / "etc/systemd/system.conf.d/50-bmoe-watchdog.conf"
    assert watchdog.exists() == bool(known.get("watchdog", {}).get("timeout_s"))
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: the exposure was not looked at")
    assert exposure(root, "bmoe-agent.service") <= (1.5 if known["systemd"] == "cpu" else 2.0)


def exposure(root: Path, unit: str) -> float:
    words = ["systemd-analyze", "security", "--offline=true", f"--root={root}", unit]
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(rf"Overall exposure level for {unit}: ([\d.]+)", told)
    assert found is not None, told
    return float(found[1])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_units_beside_the_agents_keep_to_their_exposure_too(root: Path) -> None:
    installed(root)
    assert exposure(root, "bmoe-source.service") <= 1.5 and exposure(root, "bmoe-token.service") <= 2.0
    list(install(root, source=None, board=None, program=None, sensor=True))
    groups = re.findall(r"(?m)^SupplementaryGroups=(.*)$", (root / SENSOR).read_text())
    assert groups == ["dialout"] and exposure(root, "bmoe-source.service") <= 2.0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_token_unit_may_make_the_calls_that_it_needs() -> None:
    """`~@privileged` takes chown away: a token for a board that had run before could not be given to the agent."""
    allowed = set(expanded("@system-service"))
    text = (packaged("firmware_configs", "systemd") / "bmoe-token.service").read_text()
    for line in re.findall(r"(?m)^SystemCallFilter=(.*)$", text)[1:]:
        for name in line.lstrip("~").split():
            allowed = allowed - expanded(name) if line.startswith("~") else allowed | expanded(name)
    assert {"fchown", "fchownat", "fsync", "renameat", "unlinkat", "pwrite64", "mkdirat"} <= allowed
    assert not {"mount", "setuid", "ptrace", "init_module", "reboot"} & allowed


def expanded(name: str) -> set[str]:
    """The system calls in a set of systemd's."""
    if not name.startswith("@"):
        return {name}
    told = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    words = [line.strip() for line in told.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return set().union(*map(expanded, words))
