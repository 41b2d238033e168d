"""The quick start of the README, run line by line as a reader would: a real gateway, two boards, an answer, an audit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
READY = {"bmoe up": "gateway is up", "bmoe-agent run": "event=online"}
READY_WITHIN_S = 60.0
DONE_WITHIN_S = 60.0


def block(after: str, language: str) -> str:
    """The first fenced block of a language behind a comment of the README."""
    found = re.search(rf"<!-- {after}:.*?-->\n```{language}\n(.*?)```", README, re.S)
    assert found is not None, f"the README has no block behind the comment {after!r}"
    return found[1]


@dataclass
class Shell:
    """A reader at a terminal: runs lines in one folder; those that end in & go on behind."""

    folder: Path
    behind: list[subprocess.Popen[bytes]] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BMOE")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = kept | {"PATH": path, "COLUMNS": "200"}

    def run(self, line: str) -> str:
        """Run a line to its end; what it printed. Fails with its words when it fails."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, timeout=DONE_WITHIN_S
        )
        assert done.returncode == 0, f"{line}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        self.said[" ".join(line.split()[:2])] = done.stdout.decode()
        return done.stdout.decode()

    def start(self, line: str) -> None:
        """Run a line behind; returns when it says that it is ready."""
        log = self.folder / f"behind-{len(self.behind)}.log"
        with log.open("wb") as out:
            argv = ["bash", "-c", f"exec {line}"]
            child = subprocess.Popen(argv, cwd=self.folder, env=self.environment, stdout=out, stderr=out)
        self.behind.append(child)
        wanted = next(word for command, word in READY.items() if line.startswith(command))
        deadline = time.monotonic() + READY_WITHIN_S
        while wanted not in log.read_text():  # another process has no event
            assert child.poll() is None and time.monotonic() < deadline, f"{line}: not ready\n{log.read_text()}"
            time.sleep(0.05)

    def close(self) -> None:
        """Ctrl-C for everything behind, the boards first, so that their farewells find the broker."""
        for child in reversed(self.behind):
            child.send_signal(signal.SIGINT)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A reader who has done all of the quick start but the installation, which tests/wheel does."""
    shell = Shell(tmp_path_factory.mktemp("reader"))
    try:
        for line in block("quick start", "sh").splitlines():
            if line.startswith("pip install "):
                assert "bmoe[gateway]" in line
            elif line.endswith(" &"):
                shell.start(line.removesuffix(" &"))
            else:
                shell.run(line)
        yield shell
    finally:
        shell.close()


def test_the_quick_start_has_ten_lines() -> None:
    assert len(block("quick start", "sh").splitlines()) == 10


def test_the_answer_of_the_quick_start_is_verified(reader: Shell) -> None:
    answer = json.loads(reader.said["bmoe infer"])
    assert answer["parameters"]["assurance"] == "verified"
    assert abs(sum(answer["outputs"]["probabilities"][0]) - 1) < 1e-4


def test_both_boards_of_the_quick_start_are_online(reader: Shell) -> None:
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in reader.said["bmoe fleet"].splitlines()]
    assert [row[:2] + row[3:] for row in rows if row and row[0].startswith("pi-")] == [
        ["pi-1", "ada", "yes"],
        ["pi-2", "bob", "yes"],
    ]


def test_the_receipt_of_the_quick_start_is_accepted_and_names_both_boards(reader: Shell) -> None:
    told = reader.said["bmoe audit"]
    assert told.startswith("VERIFIED: the answer to request")
    assert "pi-1 of ada" in told and "pi-2 of bob" in told


def test_the_receipt_of_the_quick_start_with_one_character_changed_is_refused(reader: Shell) -> None:
    text = (reader.folder / "answer.receipt").read_text()
    at = text.index("extra ") + 400
    (reader.folder / "changed.receipt").write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    with pytest.raises(AssertionError, match="DOES NOT VERIFY"):
        reader.run("bmoe audit changed.receipt --trust gateway/trust.json")


def test_the_python_of_the_readme_gets_an_answer_and_a_receipt(reader: Shell) -> None:
    port = json.loads((reader.folder / "gateway" / "ports.json").read_text())["api"]
    code = block("python", "python")
    assert "http://127.0.0.1:8080" in code
    (reader.folder / "client.py").write_text(code.replace(":8080", f":{port}"))
    (reader.folder / "answer.receipt").unlink()
    assert " committed " in reader.run("python client.py")
    told = reader.run("bmoe audit answer.receipt --trust gateway/trust.json --json")
    assert json.loads(told)["verified"] is True
