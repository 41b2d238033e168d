"""Every error raised on purpose is one of ours: read from the source, so that no path needs to be run to know it."""

from __future__ import annotations

import ast
from pathlib import Path

import bmoe.protocol.errors as tree
from bmoe.protocol.errors import BmoeError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for part in ("bmoe", "edge_agent", "coordinator") for p in (ROOT / part).rglob("*.py"))
OURS = {name for name, value in vars(tree).items() if isinstance(value, type) and issubclass(value, BmoeError)}
# Where another class is right: it is caught in the same file or by the library that called us, or it is our own mistake.
ALLOWED = {
    ("bmoe/inference/framing.py", "ValueError"): "one of the runner's BROKEN",
    ("bmoe/inference/runner.py", "ValueError"): "one of BROKEN",
    ("bmoe/inference/runner.py", "TimeoutError"): "one of BROKEN",
    ("bmoe/inference/runner.py", "ERRORS[kind]"): "a table of InferenceError and InputError",
    ("bmoe/inference/sessions.py", "MemoryError"): "told to the runner as a frame of its own",
    ("bmoe/inference/worker.py", "MemoryError"): "told to the runner as a frame of its own",
    ("bmoe/ledger/rules/policies/ballot.py", "ValueError"): "our own mistake, and what rules raise becomes a rejection",
    ("bmoe/ledger/rules/trust.py", "ValueError"): "a hook of json, made a ProofError",
    ("bmoe/storage/blobs.py", "FileNotFoundError"): "as obstore raises it, made an UnknownError there",
    ("bmoe/storage/installed.py", "TypeError"): "a damaged record, made a ConfigError there",
    ("bmoe/storage/update_source.py", "DownloadError"): "python-tuf's word for what a fetcher cannot get",
    ("bmoe/storage/update_source.py", "DownloadHTTPError"): "python-tuf's word for a file that is not there",
    ("bmoe/storage/strict_json.py", "ValueError"): "a hook of json, made a ManifestError",
    ("coordinator/door.py", "ValueError"): "ends one connection, caught by the reader that called",
    ("coordinator/boards.py", "ValueError"): "pydantic's way to refuse a profile, made a ConfigError there",
    ("coordinator/config.py", "ValueError"): "pydantic's way to refuse settings, made a ConfigError there",
    ("coordinator/cli/commands.py", "Exit"): "typer's own way out",
    ("coordinator/embedded/ledger_stream.py", "AssertionError"): "unreachable",
    (
        "coordinator/embedded/ready.py",
        "ValueError",
    ): "our own facts too long; a child's line is made an UnavailableError",
    ("edge_agent/source_folder.py", "PermissionError"): "an OSError like any other there, caught in the same function",
    ("edge_agent/database.py", "DatabaseError"): "sqlite's word for a damaged file, caught there",
    ("edge_agent/database.py", "OperationalError"): "sqlite's word for an unknown version, caught there",
}


def _classes() -> set[str]:
    """Our error classes, those defined beside their use included: whatever derives from one of ours by name."""
    bases = {
        node.name: {ast.unparse(b).split(".")[-1] for b in node.bases}
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found = set(OURS)
    while grown := {name for name, of in bases.items() if of & found} - found:
        found |= grown
    return found


def _raised(path: Path) -> list[tuple[int, str]]:
    """(line, class) of every `raise Class(...)` or `raise Class`; a re-raised variable is no choice of a class."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        name = ast.unparse(target).split(".")[-1]
        if name[:1].isupper():
            found.append((node.lineno, name))
    return found


def test_what_we_raise_is_ours_or_allowed_with_a_reason() -> None:
    ours = _classes()
    foreign = {
        (path.relative_to(ROOT).as_posix(), name): line
        for path in SOURCES
        for line, name in _raised(path)
        if name not in ours
    }
    assert {
        f"{file}:{line} raises {name}" for (file, name), line in foreign.items() if (file, name) not in ALLOWED
    } == (set())
    assert set(ALLOWED) - set(foreign) == set(), "allowed, and raised no more"


def test_the_tree_is_one_and_each_leaf_is_raised_somewhere() -> None:
    raised = {name for path in SOURCES for _, name in _raised(path)}
    # The root stands for all in `except`; nobody raises it.
    assert OURS - raised - {"BmoeError"} == set()
    for name in OURS:
        assert issubclass(getattr(tree, name), BmoeError) and name in (tree.__doc__ or "")


def test_nobody_hides_an_error_without_a_word() -> None:
    """`except Exception: pass` (or a bare except) swallows what nobody foresaw."""
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(step, ast.Pass) for step in node.body)
    ]
    assert hidden == []
