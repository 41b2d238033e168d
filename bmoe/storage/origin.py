"""Where a release comes from: an in-toto statement with a SLSA provenance predicate, kept beside the release.

Its SHA-256 stands in the repository's signed metadata, so it is the owner's word, under the owner's key; nobody checks here
whether that word is true. Sources: in-toto attestation framework, Statement v1; SLSA provenance v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bmoe.protocol.errors import InputError
from bmoe.storage.manifest import Model
from bmoe.storage.targets import experts_and_gate

ORIGIN_NAME = "origin.json"
MAX_ORIGIN_BYTES = 256 * 1024
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://bmoe.dev/train/v1"
# What a training run may know of itself, by the name it has in `origin.json` of a model's folder.
FACTS = ("data", "code", "seeds", "environment", "parameters", "started", "finished")


def make_origin(model: Model, facts: Mapping[str, Any]) -> bytes:
    """The statement of a version's origin from the facts known: FACTS, each as the training run gives it.

    `data` is {name: SHA-256}; `code` {"uri": …, "commit": …}; the rest is kept as given. Raises InputError for other names.
    """
    if unknown := set(facts) - set(FACTS):
        raise InputError(f"origin: expected some of {', '.join(FACTS)}, found {', '.join(sorted(unknown))}")
    data, code, parameters = (facts.get(name, {}) for name in ("data", "code", "parameters"))
    if not isinstance(data, dict) or not isinstance(code, dict) or not isinstance(parameters, dict):
        raise InputError("origin: data is an object of names and SHA-256 digests, code one with uri and commit,"
                         " parameters one of names and values")  # fmt: skip
    sources = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(data.items())]
    if code:
        commit = {"digest": {"gitCommit": code["commit"]}} if code.get("commit") else {}
        sources.append({"uri": code.get("uri", ""), **commit})
    metadata = {
        key: facts[fact] for fact, key in (("started", "startedOn"), ("finished", "finishedOn")) if fact in facts
    }
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": part.file, "digest": {"sha256": part.sha256}} for part in experts_and_gate(model)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {**parameters, "model": model.name, "version": model.version},
                "internalParameters": {key: facts[key] for key in ("seeds", "environment") if key in facts},
                "resolvedDependencies": sources,
            },
            "runDetails": {"builder": {"id": code.get("uri", "")}, "metadata": metadata},
        },
    }
    return (json.dumps(statement, indent=1, sort_keys=True) + "\n").encode()


def check_origin(data: bytes, model: Model | None = None) -> dict[str, Any]:
    """The statement in `data`, any in-toto statement v1; raises InputError where it is none, or not about this version."""
    if len(data) > MAX_ORIGIN_BYTES:
        raise InputError(f"origin: at most {MAX_ORIGIN_BYTES} bytes, found {len(data)}")
    try:
        values = json.loads(data)
        kind, predicate = values["_type"], values["predicateType"]
        subjects = {subject["digest"]["sha256"] for subject in values["subject"]}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"origin: not an in-toto statement: {error!r}") from None
    if kind != STATEMENT or type(predicate) is not str:
        raise InputError(f"origin: expected a statement of type {STATEMENT}, found {str(kind)[:100]!r}")
    if not isinstance(values.get("predicate"), dict):
        raise InputError("origin: expected a predicate that is an object")
    if model is not None and (missing := {p.sha256 for p in experts_and_gate(model)} - subjects):
        raise InputError(f"origin: the statement says nothing of {', '.join(sorted(m[:16] for m in missing))}")
    found: dict[str, Any] = values
    return found
