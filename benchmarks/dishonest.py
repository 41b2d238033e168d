"""A dishonest agent, made of the honest one with a step or two of a task's life replaced. Production knows nothing of it.

    python -m benchmarks.dishonest --state DIR --attack collude --seed 7

It has joined like any other and signs with its own enrolled keys; what it signs is wrong, or not its to send.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bmoe.inference.runner import Runner, RunResult
from bmoe.protocol.errors import BmoeError
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.topics import topic
from edge_agent.admit import Admitted, Decision, Ignored, Load, Rules
from edge_agent.config import load_settings
from edge_agent.experts import Served
from edge_agent.infer import infer
from edge_agent.report import Reporter
from edge_agent.service import serve
from edge_agent.sign import SignedOutput, Stamp, sign
from edge_agent.tasks import Steps

Twist = Callable[[np.ndarray, int], np.ndarray]


# Wrong values: (the true output, the seed) -> what is signed instead.


def collude(true: np.ndarray, seed: int) -> np.ndarray:
    """Another class wins with certainty; all who share the seed say the same of the same input, bit for bit."""
    if true.ndim < 2 or true.shape[-1] < 2:
        return true + np.asarray(1 + seed % 7, true.dtype)
    classes = true.shape[-1]
    wrong = (true.argmax(axis=-1) + 1 + seed % (classes - 1)) % classes
    return np.eye(classes, dtype=true.dtype)[wrong]


def noise(true: np.ndarray, seed: int) -> np.ndarray:
    """The truth with some noise on it, new each time."""
    return true + np.random.default_rng().normal(0, 0.05, true.shape).astype(true.dtype)


def random_values(true: np.ndarray, seed: int) -> np.ndarray:
    """Anything, new each time."""
    return np.random.default_rng().random(true.shape).astype(true.dtype)


def lazy(true: np.ndarray, seed: int) -> np.ndarray:
    """A constant, as from one who does no work."""
    return np.full_like(true, 1.0 / true.shape[-1] if true.ndim else 0)


def cheap(true: np.ndarray, seed: int) -> np.ndarray:
    """What a cheaper, half-precision engine would give."""
    return true.astype(np.float16).astype(true.dtype)


TWISTS: dict[str, Twist] = {
    "collude": collude,
    "noise": noise,
    "random": random_values,
    "lazy": lazy,
    "cheap": cheap,
}


def twisted(tensor: Tensor, twist: Twist, seed: int) -> Tensor:
    """A tensor of the same name, dtype and dims with other values."""
    array = np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.dims)
    return replace(tensor, data=np.ascontiguousarray(twist(array, seed), array.dtype).tobytes())


def lying(twist: Twist, seed: int) -> Steps:
    """Computes the truth and signs something else."""

    async def lie(admitted: Admitted, served: Served, runner: Runner) -> RunResult:
        result = await infer(admitted, served, runner)
        return replace(result, outputs=tuple(twisted(t, twist, seed) for t in result.outputs))

    return Steps(infer=lie)


# Wrong conduct: the values are true, but what is sent is not ours to send.


def silent() -> Steps:
    """Takes every task and says nothing."""

    def deaf(data: bytes, rules: Rules, load: Callable[[bytes, int], Load], now_ms: int) -> Decision:
        return Ignored("silent", "an agent that never answers")

    return Steps(admit=deaf)


def replay() -> Steps:
    """Sends the first output that it ever signed, whatever the task."""
    first: list[bytes] = []

    async def old(reporter: Reporter, task: bytes, message: bytes) -> bool:
        if not first:
            first.append(message)
        return await reporter.report(task, first[0])

    return Steps(report=old)


class Second:
    """Signs once more what an agent has signed: other values, another task, or another addressee."""

    def __init__(self, send: Callable[[Second, Reporter, Admitted, RunResult], list[tuple[str, bytes]]]) -> None:
        self._send = send
        self._signed: dict[bytes, tuple[Admitted, RunResult]] = {}
        self.stamp: Stamp | None = None
        self.steps = Steps(sign=self._sign, report=self._report)

    def message(self, admitted: Admitted, result: RunResult) -> bytes:
        """A properly signed output."""
        assert self.stamp is not None
        return sign(self.stamp, admitted, result).message

    @property
    def topic(self) -> str:
        """Where our own outputs go."""
        assert self.stamp is not None
        return topic(self.stamp.name, "output")

    def _sign(self, stamp: Stamp, admitted: Admitted, result: RunResult) -> SignedOutput:
        self.stamp = stamp
        self._signed[admitted.task.task] = (admitted, result)
        return sign(stamp, admitted, result)

    async def _report(self, reporter: Reporter, task: bytes, message: bytes) -> bool:
        done = await reporter.report(task, message)
        admitted, result = self._signed.pop(task)
        for where, second in self._send(self, reporter, admitted, result):
            try:
                await reporter._link.publish(where, second, qos=1)
            except BmoeError as error:
                print(f"not sent on {where}: {error}", file=sys.stderr)
        return done


def equivocate(seed: int) -> Steps:
    """Two signed outputs for one task: the truth, then a lie."""

    def send(self: Second, _: Reporter, admitted: Admitted, result: RunResult) -> list[tuple[str, bytes]]:
        lie = replace(result, outputs=tuple(twisted(t, collude, seed) for t in result.outputs))
        return [(self.topic, self.message(admitted, lie))]

    return Second(send).steps


def unasked() -> Steps:
    """Beside its own tasks, answers one that nobody gave it: an invented id, as made in the same millisecond."""

    def send(self: Second, _: Reporter, admitted: Admitted, result: RunResult) -> list[tuple[str, bytes]]:
        invented = replace(admitted, task=replace(admitted.task, task=admitted.task.task[:6] + os.urandom(10)))
        return [(self.topic, self.message(invented, result))]

    return Second(send).steps


def steal_topic(victim: str, seed: int) -> Steps:
    """Publishes a lie, signed as itself, where only `victim` may."""

    def send(self: Second, _: Reporter, admitted: Admitted, result: RunResult) -> list[tuple[str, bytes]]:
        lie = replace(result, outputs=tuple(twisted(t, collude, seed) for t in result.outputs))
        return [(topic(victim, "output"), self.message(admitted, lie))]

    return Second(send).steps


def steps_of(attack: str, seed: int, victim: str | None) -> Steps:
    """The steps of an attack by name."""
    if attack in TWISTS:
        return lying(TWISTS[attack], seed)
    conducts: dict[str, Callable[[], Steps]] = {
        "equivocate": lambda: equivocate(seed),
        "replay": replay,
        "silent": silent,
        "unasked": unasked,
        "steal-topic": lambda: steal_topic(victim or "edge-01", seed),
    }
    return conducts[attack]()


ATTACKS = (*TWISTS, "equivocate", "replay", "silent", "unasked", "steal-topic")


def main(argv: list[str] | None = None) -> int:
    """Serve dishonestly until SIGTERM. Exit status 2 for what cannot start."""
    parser = argparse.ArgumentParser(prog="benchmarks.dishonest", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--attack", choices=ATTACKS, required=True)
    parser.add_argument("--seed", type=int, default=0, help="colluders share it")
    parser.add_argument("--victim", help="whose topic steal-topic publishes on")
    given = parser.parse_args(argv)
    try:
        asyncio.run(serve(load_settings(state=given.state), steps_of(given.attack, given.seed, given.victim)))
    except BmoeError as error:
        print(f"dishonest: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
