"""Where a release comes from: what a training run knows, made into a statement that says which files it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmoe.protocol.errors import InputError
from bmoe.storage.manifest import load_model
from bmoe.storage.origin import ORIGIN_NAME, PREDICATE, check_origin, make_origin
from coordinator.models.publish import read_origin

ROOT = Path(__file__).resolve().parents[2]
WEARABLE = ROOT / "models" / "wearable"


@pytest.mark.parametrize("name", ["wearable", "fashion"])
def test_a_built_in_model_states_its_data_its_seed_and_its_environment(name: str) -> None:
    folder = ROOT / "models" / name
    model = load_model(folder)
    statement = check_origin(read_origin(folder, model, None), model)
    built = statement["predicate"]["buildDefinition"]
    assert statement["predicateType"] == PREDICATE
    assert all(len(source["digest"]["sha256"]) == 64 for source in built["resolvedDependencies"] if "name" in source)
    assert built["internalParameters"] == {"seeds": {"torch": 1}, "environment": {"torch": "2.13.0"}}
    assert {s["digest"]["sha256"] for s in statement["subject"]} == {p.sha256 for p in (*model.experts, model.gate)}


def test_a_model_of_which_nothing_is_known_states_its_files(tmp_path: Path) -> None:
    model = load_model(WEARABLE)
    statement = check_origin(read_origin(tmp_path, model, None), model)
    assert len(statement["subject"]) == 7
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"] == []


def test_a_statement_made_elsewhere_is_taken_as_it_is(tmp_path: Path) -> None:
    model = load_model(WEARABLE)
    path = tmp_path / "theirs.json"
    path.write_bytes(json.dumps(json.loads(make_origin(model, {"seeds": [7]}))).encode())
    assert read_origin(WEARABLE, model, path) == path.read_bytes()


BAD = {
    "another model's": (
        json.dumps(json.loads(make_origin(load_model(ROOT / "models" / "fashion"), {}))),
        "says nothing of",
    ),
    "no JSON": ("seed: 7", "is not JSON"),
    "facts of other names": ('{"seed": 7}', "expected some of data, code"),
    "data without digests": ('{"data": ["watch.npy"]}', "data is an object"),
    "a statement of another type": (
        '{"_type": "x", "predicateType": "y", "subject": []}',
        "expected a statement of type",
    ),
    "a statement without a predicate": (
        '{"_type": "https://in-toto.io/Statement/v1", "predicateType": "y", "subject": [], "predicate": []}',
        "expected a predicate that is an object",
    ),
    "parameters that are a list": ('{"parameters": [1]}', "parameters one of names and values"),
    "no statement": ('{"_type": 7}', "not an in-toto statement"),
    "a list": ("[]", "not an in-toto statement"),
}


@pytest.mark.parametrize("story", BAD)
def test_what_is_no_statement_of_this_version_is_refused_in_one_line(tmp_path: Path, story: str) -> None:
    text, reason = BAD[story]
    (tmp_path / ORIGIN_NAME).write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        read_origin(tmp_path, load_model(WEARABLE), None)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_named_and_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_origin(WEARABLE, load_model(WEARABLE), tmp_path / "missing.json")
