"""The documents tell the truth about the code: tables, paths, links, commands, settings, log events."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from scripts import by_path

from bmoe.ledger.audit import _parser as audit_parser
from bmoe.ledger.rules.standing import Standing
from bmoe.protocol.messages import MESSAGES, Refusal, open_message
from bmoe.protocol.topics import DOWN, UP
from coordinator.cli.commands import app
from coordinator.config import GatewaySettings
from coordinator.emulate.cache import CACHE
from coordinator.state_layout import StateLayout
from edge_agent.cli import _parser as agent_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for package in ("bmoe", "coordinator", "edge_agent")
    for path in (ROOT / package).rglob("*.py")
}
CODE = re.compile(r"`([^`\n]+)`")
OF_A_STATE_DIRECTORY = {
    f"coordinator/{name}" for name in ("", "coordinator.key", "fleet.json", "api_tokens.json", "rollouts.json")
}
OPTIONS = {"BMOE_API_TOKEN", "BMOE_JOIN_TOKEN", "BMOE_WIFI_PASSWORD", CACHE}  # variables of options, not of settings
GROUPS = ("token", "device", "api-token", "tenant", "boards", "model", "release", "rollout")
TOP_FOLDERS = ("bmoe/", "coordinator/", "edge_agent/", "benchmarks/", "docs/", "models/", "tests/", "firmware_configs/")


def documents() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(TEXTS))


# Tables.


@documents()
def test_a_table_that_the_code_has_outgrown_is_noticed(name: str) -> None:
    assert by_path(ROOT / "docs" / "tables.py").renewed(TEXTS[name]) == TEXTS[name], "run `python docs/tables.py`"


def test_every_table_stands_in_a_document() -> None:
    tables = by_path(ROOT / "docs" / "tables.py")
    assert set(tables.TABLES) == {found[2] for text in TEXTS.values() for found in tables.BLOCK.finditer(text)}


def test_a_table_made_anew_replaces_what_was_edited_by_hand() -> None:
    tables = by_path(ROOT / "docs" / "tables.py")
    block = "<!-- begin policies -->\n| `honest` |\n<!-- end policies -->"
    assert "`referee` 1" in tables.renewed(block) and "honest" not in tables.renewed(block)


def test_the_example_message_reads_as_it_is_explained() -> None:
    text = TEXTS["docs/wire_format.md"]
    shown = text.split("```text\n", 1)[1].split("```", 1)[0]
    header = open_message(Refusal, bytes.fromhex(shown)).header
    assert (header.author, header.seq, header.reason, header.detail) == ("agent-1", 7, "busy", "queue of 8 is full")
    flat = shown.replace("\n", "")
    explained = [re.sub(r"[ `]", "", CODE.findall(line)[0]) for line in text.split("| bytes |")[1].splitlines()[2:6]]
    for part in explained:
        assert part in flat


def test_every_message_and_channel_is_explained() -> None:
    text = TEXTS["docs/wire_format.md"]
    spoken = text.split("### Types")[1]
    missing = [cls.__name__ for cls in MESSAGES.values() if spoken.count(f"`{cls.__name__}`") < 2]
    assert not missing, f"types in a table and nowhere else: {missing}"
    assert re.findall(r"^\| `(\w+)` \| (?:coordinator|agent) \|", text, re.M) == [*DOWN, *UP]


def test_every_path_of_the_servers_is_listed_and_no_other() -> None:
    api = {f"GET {path}" for path in re.findall(r'"(/v\d[^"]*)", _(?!start|act)', SOURCES["coordinator/api.py"])}
    api |= {
        "POST /v1/rollouts",
        "POST /v1/rollouts/{model}/{what}",
        "POST /v2/models/{model}/infer",
        "POST /v2/models/{model}/versions/{version}/infer",
    }
    served = api | {f"{method} {path}" for path, method in _routes("coordinator/identity/")}
    listed = set(re.findall(r"^\| `((?:GET|POST|DELETE) /[^`?]+)`", TEXTS["docs/wire_format.md"], re.M))
    assert listed == served


def _routes(prefix: str) -> set[tuple[str, str]]:
    text = "\n".join(source for path, source in SOURCES.items() if path.startswith(prefix))
    one = {(p, m) for p, m in re.findall(r'\("(/v\d[^"]*)", "(GET|POST|DELETE)"', text)}
    other = {(p, m) for m, p in re.findall(r'\("(GET|POST|DELETE)", "(/v\d[^"]*)"', text)}
    return one | other


# Paths, links, words.


@documents()
def test_the_files_named_exist(name: str) -> None:
    named = {code for code in CODE.findall(TEXTS[name]) if code.startswith(TOP_FOLDERS) and " " not in code}
    named = {code for code in named if not re.fullmatch(r"bmoe/([a-z-]+/)?v1(/.*)?", code)}  # contexts and topics
    missing = [code for code in named - OF_A_STATE_DIRECTORY if not (ROOT / code).exists()]
    assert not missing


@documents()
def test_relative_links_resolve(name: str) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])]
    broken = [link for link in links if "://" not in link and not ((ROOT / name).parent / link).exists()]
    assert not broken


@documents()
def test_no_word_of_this_machine_or_of_a_registry(name: str) -> None:
    hosts = ("py" + "pi.org", "python" + "hosted", "/wo" + "rk/", "/ro" + "ot/", "/bash_" + "jobs")
    assert not [word for word in hosts if word in TEXTS[name]]


def test_the_picture_is_well_formed_and_readable_in_the_dark() -> None:
    import xml.etree.ElementTree as ElementTree

    file = ROOT / "docs" / "picture.svg"
    root = ElementTree.parse(file).getroot()
    words = {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"client", "coordinator", "registrar", "validator", "broker", "ledger", "board", "auditor"} <= words
    assert "prefers-color-scheme: dark" in file.read_text(encoding="utf-8")


def test_every_decision_has_its_four_parts() -> None:
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        parts = ("**Context.**", "**Decision.**", "**What lost, and why.**", "**Consequences.**")
        assert [part for part in parts if part not in text] == [], path.name


# Commands: each that a document shows must be one that the program takes.


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every `bmoe ...` and `bmoe-agent ...` in a shell block or in code marks."""
    found = []
    for name, text in TEXTS.items():
        for line in shell_lines(text):
            inner = re.findall(r"\$\(([^()]*)\)", line)
            for part in [*inner, re.sub(r"\$\([^()]*\)", "bmoe1.XXXX", line)]:
                shown = re.search(r"(?:^|\s)(bmoe(?:-agent)? [a-z].*)", part.split("#")[0].split(" > ")[0].rstrip(" &"))
                if shown is not None:
                    found.append((name, shown[1]))
    return sorted(set(found))


def shell_lines(text: str) -> list[str]:
    """The lines of shell blocks, and what stands in code marks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [
        *(line for block in blocks for line in block.splitlines()),
        *CODE.findall(re.sub(r"```.*?```", "", text, flags=re.S)),
    ]


@pytest.mark.parametrize(("name", "line"), commands())
def test_a_command_shown_is_one_that_the_program_takes(name: str, line: str) -> None:
    words = shlex.split(line)
    named = 3 if words[:2] in [["bmoe", group] for group in GROUPS] else 2
    if len(words) == named:
        words.append("--help")  # only the command is named, not a use of it
    try:
        _parse(words)
    except SystemExit as end:
        assert end.code == 0, f"{name}: {line}"


def _parse(words: list[str]) -> None:
    """Parse as the program itself would; raises SystemExit for what it refuses."""
    if words[:2] == ["bmoe", "audit"]:
        audit_parser().parse_args(words[2:])
        return
    if words[0] == "bmoe-agent":
        words = words if words[1] != "join" or len(words) > 2 else [*words, "bmoe1.XXXX"]
        assert isinstance(agent_parser().parse_args(words[1:]), argparse.Namespace)
        return
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no such command: {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_context(command.name or "", list(rest))
    except Exception as error:  # click's own errors, whichever copy of click typer brings
        pytest.fail(f"{' '.join(words)}: {getattr(error, 'message', '') or repr(error)}") if not _is_exit(
            error
        ) else None


def _is_exit(error: Exception) -> bool:
    return type(error).__name__ == "Exit" and getattr(error, "exit_code", 1) == 0


@pytest.mark.parametrize(
    "line", ["bmoe infer wearable x.npy --polcy full", "bmoe tokens create", "bmoe-agent run --turbo"]
)
def test_a_command_that_the_program_refuses_would_be_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, AssertionError, pytest.fail.Exception)):
        _parse(shlex.split(line))


def test_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = [line for text in TEXTS.values() for line in shell_lines(text)]
    shown = {match[1] for line in lines if (match := re.match(r"make ([a-z-]+)", line))}
    assert {"demo", "test", "test-train"} <= shown <= targets


def test_variables_shown_are_settings() -> None:
    known = {f"BMOE_{name.upper()}" for name in GatewaySettings.model_fields} | OPTIONS
    shown = {word for text in TEXTS.values() for word in re.findall(r"\bBMOE_(?!AGENT_)[A-Z_]+\b", text)}
    assert "BMOE_PUBLIC_HOSTS" in shown and shown <= known


# What operators look things up in.


def events(prefix: str) -> set[str]:
    """The names of structured log events in the sources under a prefix."""
    pattern = r'\b(?:log\.\w+|report|_report|event|tally\.add)\(\s*"([a-z]+(?:_[a-z]+)*)"'
    return {e for path, text in SOURCES.items() if path.startswith(prefix) for e in re.findall(pattern, text)}


@pytest.mark.parametrize(
    ("heading", "prefixes", "excluded"),
    [
        ("Board:", ("edge_agent/",), ()),
        ("Registrar:", ("coordinator/identity/",), ()),
        ("Coordinator:", ("coordinator/",), ("coordinator/identity/", "coordinator/up.py", "coordinator/engines.py")),
    ],
)
def test_every_log_event_is_explained(heading: str, prefixes: tuple[str, ...], excluded: tuple[str, ...]) -> None:
    section = TEXTS["docs/operations.md"].split(f"\n{heading}\n")[1].strip().split("\n\n")[0]
    told = {event for row in section.splitlines()[2:] for event in CODE.findall(row.split("|")[1])}
    made = set().union(*map(events, prefixes)) - set().union(set(), *map(events, excluded))
    shared = set().union(set(), *map(events, excluded))  # a name may be used on both sides
    assert made <= told, f"not explained: {sorted(made - told)}"
    assert told <= made | shared, f"no longer logged: {sorted(told - made - shared)}"


def test_every_standing_is_explained() -> None:
    for name in ("docs/ledger.md", "docs/operations.md"):
        assert [s.value for s in Standing if s.value not in TEXTS[name]] == []


def test_every_file_of_the_state_directory_is_judged() -> None:
    layout, text = StateLayout(Path("state")), TEXTS["docs/threat_model.md"]
    known = [layout.trust, layout.signing_key, layout.fleet, layout.evidence, layout.ports, layout.identity / "ca.key"]
    missing = [str(path) for path in known if f"`{path.relative_to('state')}`" not in text]
    assert not missing


def test_the_demo_line_is_the_one_that_the_demo_prints() -> None:
    shown = re.search(r"^DEMO (.*)$", TEXTS["README.md"], re.M)
    source = (ROOT / "benchmarks" / "demo" / "summary.py").read_text(encoding="utf-8")
    assert shown is not None
    assert re.findall(r"(\w+)=", shown[1]) == re.findall(r"(\w+)=\{", source)


def test_the_claim_is_stated_with_its_limits() -> None:
    text = " ".join(TEXTS["README.md"].replace("**", "").split())
    claim = "right whenever one of those whose outputs are counted is honest and the referee is"
    assert f"{claim}, whatever the share of malicious agents" in text
    assert "colluding agents of different owners" in text and "caught only by spot checks" in text
