"""A Python function as a source: a generator that yields requests and is sent back their answers.

    def readings():
        while True:
            answer = yield {"window": read_sensor()}     # arrays by input name, or an infer body
            if not answer.error:
                act_on(answer.outputs["probabilities"], answer.assurance)

It runs in a thread of its own, so it may block. What it yields while the gateway is away waits, or is answered locally.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import ConfigError, InferenceError, InputError, RefusedError
from bmoe.protocol.threads import in_thread
from edge_agent.oip import arrays_of, outputs_of
from edge_agent.source import Ask, Outcome, Question

_END = object()


@dataclass(frozen=True)
class Answer:
    """What a hook is told: arrays by output name, "verified" or "unverified", and the whole reply.

    `error` is empty, or says why there is no answer. `differs` is for the second function alone: whether the verified
    answer is another than the local one was.
    """

    id: str
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    assurance: str = ""
    reply: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    differs: bool = False


def load_function(named: str) -> Callable[..., Any]:
    """The function of `module:function`; modules are also looked for in the working directory. Raises ConfigError."""
    module, colon, function = named.partition(":")
    if not (module and colon and function):
        raise ConfigError(f"a function is named as module:function, found {named!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's may raise whatever it likes
        raise ConfigError(f"{named} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ConfigError(f"{named} is no function")
    return found  # type: ignore[no-any-return]


class HookSource:
    """Drives a generator; `verified(answer)` is called for each answer that was given locally and is verified later."""

    def __init__(self, function: Callable[..., Any], verified: Callable[[Answer], None] | None = None) -> None:
        if not inspect.isgeneratorfunction(function):
            raise ConfigError(f"{function.__module__}:{function.__name__} must yield requests: it has no yield")
        self._function, self._verified = function, verified

    async def run(self, model: ReleasedModel, ask: Ask) -> None:
        """Give what the generator yields, one after the other, until it ends. Raises InferenceError if it fails."""
        generator: Iterator[Any] = self._function()
        answer: Answer | None = None
        try:
            while (given := await in_thread(lambda: _advance(generator, answer))) is not _END:  # noqa: B023
                answer = await self._answer(given, ask)
        finally:
            generator.close() if not generator.gi_running else None  # type: ignore[attr-defined]

    async def told(self, outcome: Outcome) -> None:
        """Tell the second function, if there is one."""
        if self._verified is not None:
            answer, function = _answer(outcome.reply, outcome.id, outcome.differs), self._verified
            await in_thread(lambda: _call(function, answer))

    async def _answer(self, given: Any, ask: Ask) -> Answer:
        identity = os.urandom(16).hex()
        if not isinstance(given, dict):
            return Answer(
                identity, error=f"a request is a dict of arrays or an infer body, found {type(given).__name__}"
            )
        try:
            return _answer(await ask(Question(identity, given, identity)), identity)
        except (InputError, RefusedError) as error:
            return Answer(identity, error=str(error))


def _answer(reply: dict[str, Any], identity: str, differs: bool = False) -> Answer:
    if "error" in reply:
        return Answer(identity, reply=reply, error=str(reply["error"]))
    assurance = str(reply["parameters"].get("assurance", ""))
    return Answer(identity, arrays_of(outputs_of(reply)), assurance, reply, "", differs)


def _advance(generator: Any, answer: Answer | None) -> Any:
    try:
        return generator.send(answer)
    except StopIteration:
        return _END
    except Exception as error:
        raise InferenceError(f"the source failed: {type(error).__name__}: {error}") from error


def _call(function: Callable[[Answer], None], answer: Answer) -> None:
    try:
        function(answer)
    except Exception as error:
        raise InferenceError(f"the source's second function failed: {type(error).__name__}: {error}") from error
