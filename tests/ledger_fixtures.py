"""A small fleet in memory: registrar, coordinator, validators and agents that really sign, and one `toy` expert.

The frames are what the real processes would write; a test changes one thing and looks at what the rules believe.
The toy expert is y = x @ W + b in float32 [N, 4] -> [N, 3], both as numpy here and as ONNX bytes (`TOY_ONNX`).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx_models import FLOAT, graph, model, node, tensor, value

from bmoe.ledger.rules.combine import choose
from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import (
    BY_REFEREE,
    NOBODY,
    Answer,
    Challenge,
    Entry,
    Genesis,
    MemberEntry,
    ModelEntry,
    Opened,
    ReleaseEntry,
    Tick,
    Verdict,
)
from bmoe.ledger.rules.fold import Applied, apply_message
from bmoe.ledger.rules.frames import NO_FRAME, build_frame
from bmoe.ledger.rules.membership import RULES_VERSION
from bmoe.ledger.rules.outputs import opening_of
from bmoe.ledger.rules.policies.ballot import LETTERS
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Trust, validator_key
from bmoe.ledger.rules.voting import Candidate, Tolerance, distance, stance
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Member, ModelRelease, Output, Release, Task, seal_header, seal_message, tensor_specs
from bmoe.protocol.tensors import Tensor

COLUMNS, CLASSES, EPSILON = 4, 3, 1e-5
_DRAW = np.random.default_rng(11)
WEIGHTS = _DRAW.uniform(-1, 1, (COLUMNS, CLASSES)).astype(np.float32)
BIAS = _DRAW.uniform(-1, 1, CLASSES).astype(np.float32)
TOY_ONNX = model(
    graph(
        [node("Gemm", ["x", "w", "b"], ["y"])],
        [value("x", FLOAT, ["N", COLUMNS])],
        [value("y", FLOAT, ["N", CLASSES])],
        [tensor("w", WEIGHTS), tensor("b", BIAS)],
    )
)
TOY = hashlib.sha256(TOY_ONNX).digest()
TOLERANCES = (Tolerance("float32", EPSILON),)
Kind = tuple[type[Entry], dict[str, Any]]


def toy(x: np.ndarray) -> np.ndarray:
    """What an honest agent computes: float32 [N, 4] -> [N, 3]."""
    return (x @ WEIGHTS + BIAS).astype(np.float32)


def inputs_for(rows: int, seed: int = 0) -> np.ndarray:
    """Some input: float32 [rows, 4]."""
    return np.random.default_rng(seed).uniform(-1, 1, (rows, COLUMNS)).astype(np.float32)


def tensor_of(name: str, array: np.ndarray) -> Tensor:
    """An array as a tensor on the wire."""
    little = array.astype(array.dtype.newbyteorder("<"))
    return Tensor(name, array.dtype.name, tuple(array.shape), little.tobytes())


@dataclass(frozen=True)
class Signed:
    """A signed output: who, its envelope, the opening of its commitment, and the whole message as it goes over MQTT."""

    author: str
    envelope: bytes
    opening: bytes
    tensors: tuple[Tensor, ...]

    @property
    def message(self) -> bytes:
        """Envelope and opening: what an agent publishes."""
        return self.envelope + self.opening


@dataclass(frozen=True)
class OpenTask:
    """A task whose slot is open: id, input and what it is committed to."""

    task: bytes
    x: np.ndarray
    salt: bytes
    input_root: bytes

    @property
    def rows(self) -> int:
        """The batch's rows."""
        return self.x.shape[0]


@dataclass
class _Chain:
    seq: int = 0
    previous: bytes = NO_FRAME


@dataclass
class Fleet:
    """Everyone's keys, everyone's chain of frames, the stream so far (`messages`), and a state that folded it.

    `found()` writes genesis, members and releases. Each agent belongs to an owner of its own, `owner-<agent>`.
    """

    agent_count: int = 5
    validator_count: int = 1
    ledger: bytes = bytes(range(16))
    epoch: int = 1
    origin: str = "bmoe.test/ledger"
    registrar: Signer = field(default_factory=Signer.generate)
    messages: list[bytes] = field(default_factory=list)
    leaves: list[bytes] = field(default_factory=list)
    now_ms: int = 1_800_000_000_000

    def __post_init__(self) -> None:
        self.agents = [f"agent-{i + 1}" for i in range(self.agent_count)]
        self.validators = [f"validator-{i + 1}" for i in range(self.validator_count)]
        names = ["coordinator", *self.agents, *self.validators]
        self.signers = {"registrar": self.registrar, **{name: Signer.generate() for name in names}}
        self.chains: dict[str, _Chain] = {}
        self.state = State(self.ledger, self.epoch, self.registrar.public_key)
        self._tasks = 0

    @property
    def trust(self) -> Trust:
        """The policy of an auditor of this ledger."""
        keys = tuple(validator_key(name, self.signers[name].public_key) for name in self.validators)
        return Trust(self.ledger, self.epoch, self.origin, self.registrar.public_key, keys, quorum_of(len(keys)))

    def common(self, author: str, seq: int = 0) -> dict[str, Any]:
        """The fields of every header."""
        return {"ledger": self.ledger, "epoch": self.epoch, "author": author, "seq": seq}

    def frame(self, author: str, *kinds: Kind, attachments: Sequence[bytes] = ()) -> bytes:
        """The author's next frame over these entries; its chain moves on."""
        chain = self.chains.setdefault(author, _Chain())
        self.now_ms += 1
        common = self.common(author, chain.seq + 1)
        entries = [kind(**common, time_ms=self.now_ms, **fields).to_bytes() for kind, fields in kinds]
        data, digest = build_frame(
            self.signers[author],
            **common,
            previous=chain.previous,
            time_ms=self.now_ms,
            entries=entries,
            attachments=attachments,
        )
        chain.seq, chain.previous = chain.seq + 1, digest
        return data

    def enter(self, author: str, *kinds: Kind, attachments: Sequence[bytes] = ()) -> Applied:
        """Write the author's next frame, fold it, and return what became of it."""
        data = self.frame(author, *kinds, attachments=attachments)
        self.messages.append(data)
        applied = apply_message(self.state, data)
        self.leaves.extend(applied.leaves)
        return applied

    def genesis(self) -> Kind:
        """The first entry."""
        validators = tuple((name, self.signers[name].public_key) for name in self.validators)
        fields = {"origin": self.origin, "registrar": self.registrar.public_key, "validators": validators}
        return Genesis, {**fields, "quorum": quorum_of(len(validators)), "rules": RULES_VERSION}

    def member(self, name: str, role: str, owner: str = "") -> Kind:
        """The enrolment of one member."""
        statement = Member(
            **self.common("registrar"),
            member=name,
            role=role,
            public_key=self.signers[name].public_key,
            owner=owner or f"owner-{name}",
            batch="",
            spki=bytes(32),
            issued_ms=self.now_ms,
        )
        return MemberEntry, {"statement": seal_header(self.registrar, statement)}

    def release(self, digest: bytes = TOY, name: str = "toy") -> Kind:
        """The release of the toy expert."""
        statement = Release(
            **self.common("registrar"),
            model="toy",
            expert_name=name,
            digest=digest,
            size=len(TOY_ONNX),
            opset=17,
            memory_mb=64,
            batch=True,
            inputs=(("x", "float32", (0, COLUMNS)),),
            outputs=(("y", "float32", (0, CLASSES), struct.pack(">d", EPSILON)),),
            owner="owner-model",
            issued_ms=self.now_ms,
        )
        return ReleaseEntry, {"statement": seal_header(self.registrar, statement)}

    def model(self, experts: Sequence[bytes] = (TOY,), version: int = 1, top_k: int = 1) -> Kind:
        """The release of the toy model: no gate, so its first experts are always chosen."""
        statement = ModelRelease(
            **self.common("registrar"),
            model="toy",
            version=version,
            manifest=bytes(32),
            gate=b"",
            experts=tuple(experts),
            top_k=top_k,
            combine="weighted_sum",
            cacheable=False,
            issued_ms=self.now_ms,
        )
        return ModelEntry, {"statement": seal_header(self.registrar, statement)}

    def found(self) -> None:
        """Genesis, everyone enrolled, the expert and the model released."""
        self.enter("registrar", self.genesis())
        roles = {"coordinator": ["coordinator"], "validator": self.validators, "agent": self.agents}
        self.enter("registrar", *[self.member(name, role) for role, names in roles.items() for name in names])
        self.enter("registrar", self.release(), self.model())

    def opened(self, x: np.ndarray, expert: bytes = TOY) -> tuple[OpenTask, Kind]:
        """A task over `x` and the entry that opens its slot."""
        self._tasks += 1
        task = self.now_ms.to_bytes(6, "big") + self._tasks.to_bytes(10, "big")
        salt = hashlib.sha256(task).digest()[:16]
        root = commit_rows("", salt, [tensor_of("x", x)], x.shape[0])
        return OpenTask(task, x, salt, root), (Opened, {"tasks": ((task, expert, x.shape[0]),)})

    def open_task(self, rows: int = 2, seed: int = 0, expert: bytes = TOY) -> OpenTask:
        """Open a slot on the ledger."""
        task, entry = self.opened(inputs_for(rows, seed), expert)
        self.enter("coordinator", entry)
        return task

    def task_message(self, task: OpenTask, agent: str, expert: bytes = TOY) -> bytes:
        """The coordinator's signed task message to one agent, with salt and input."""
        x = tensor_of("x", task.x)
        header = Task(
            **self.common("coordinator", self._tasks),
            task=task.task,
            agent=agent,
            model="toy",
            expert=expert,
            rows=task.rows,
            inputs=tensor_specs([x]),
            input_root=task.input_root,
            deadline_ms=self.now_ms + 10_000,
            timeout_ms=1000,
        )
        return seal_message(self.signers["coordinator"], header, [task.salt, x.data])

    def output(self, author: str, task: OpenTask, y: np.ndarray | None = None, expert: bytes = TOY) -> Signed:
        """What `author` signs for a task: the honest value unless `y` says otherwise."""
        tensors = (tensor_of("y", toy(task.x) if y is None else y.astype(np.float32)),)
        salt = hashlib.sha256(author.encode() + task.task).digest()[:16]
        header = Output(
            **self.common(author, self._tasks),
            task=task.task,
            expert=expert,
            input_root=task.input_root,
            rows=task.rows,
            outputs=tensor_specs(tensors),
            output_root=commit_rows(author, salt, tensors, task.rows),
            provider="CPUExecutionProvider",
            duration_us=100,
        )
        return Signed(author, seal_header(self.signers[author], header), opening_of(salt, tensors), tensors)

    def verdict(
        self,
        task: OpenTask,
        outputs: Sequence[Signed],
        *,
        accepted: int = 0,
        referee: Signed | None = None,
        policy: str = "quorum",
        outcome: str = "accepted",
        expert: bytes = TOY,
        **changes: Any,
    ) -> Kind:
        """The verdict over these outputs, true unless `changes` to its fields make it false."""
        every = [*outputs, *([referee] if referee else [])]
        chosen = every[-1] if accepted == BY_REFEREE else every[accepted] if outcome == "accepted" else None
        stances = "".join(stance_letter(chosen, o) for o in outputs) if chosen else "i" * len(outputs)
        fields = {
            "task": task.task,
            "model": "toy",
            "expert": expert,
            "rows": task.rows,
            "input_root": task.input_root,
            "policy": policy,
            "policy_version": 1,
            "assigned": tuple(o.author for o in outputs),
            "outputs": tuple(o.envelope for o in outputs),
            "referee": referee.envelope if referee else b"",
            "openings": tuple(digest_of(o.opening) for o in every),
            "as_of": self.state.size,
            "outcome": outcome,
            "accepted": accepted if outcome == "accepted" else NOBODY,
            "stances": stances,
            "reason": "",
            "tenant": "public",
        }
        return Verdict, {**fields, **changes}

    def decide(self, task: OpenTask, outputs: Sequence[Signed], **options: Any) -> Applied:
        """Enter the verdict with its openings attached."""
        referee = options.get("referee")
        attached = [o.opening for o in (*outputs, *([referee] if referee else []))]
        return self.enter("coordinator", self.verdict(task, outputs, **options), attachments=attached)

    def answer(
        self, parts: Sequence[tuple[OpenTask, Signed]], top_k: int = 1, **changes: Any
    ) -> tuple[Kind, bytes, np.ndarray]:
        """The answer to a one-row request over accepted values: entry, the result's opening, and the result [1, 3].

        Part i is expert i of the model; row 0 of its task is the request's.
        """
        experts, weights = choose(np.ones((1, len(parts)), np.float64), top_k)
        values = [np.frombuffer(s.tensors[0].data, "<f4").reshape(s.tensors[0].dims) for _, s in parts]
        total = np.zeros((1, CLASSES), np.float64)
        for k in range(top_k):
            total += np.float64(weights[0, k]) * values[k][:1].astype(np.float64)
        result = values[0][:1] if top_k == 1 else total.astype(np.float32)
        tensors = (tensor_of("y", result),)
        request = b"request" + self._tasks.to_bytes(9, "big")
        salt = hashlib.sha256(request).digest()[:16]
        fields = {
            "request": request,
            "model": "toy",
            "version": self.state.models["toy"].version,
            "gate": b"",
            "request_root": commit_rows("", salt, [tensor_of("x", parts[0][0].x[:1])], 1),
            "rows": 1,
            "top_k": top_k,
            "experts": experts.tobytes(),
            "weights": weights.tobytes(),
            "tasks": tuple(task.task for task, _ in parts),
            "task_index": np.arange(top_k, dtype="<u2").tobytes(),
            "task_rows": np.zeros(top_k, "<u2").tobytes(),
            "openings": tuple(digest_of(s.opening) for _, s in parts),
            "outputs": tensor_specs(tensors),
            "result_root": commit_rows("", salt, tensors, 1),
            "result_opening": digest_of(opening_of(salt, tensors)),
            "tenant": "public",
        }
        return (Answer, {**fields, **changes}), opening_of(salt, tensors), result

    def challenge(self, task: OpenTask, own: Signed, targets: Sequence[Signed], kind: type = Challenge) -> Applied:
        """A validator's claim that these outputs are wrong, entered with its openings."""
        fields = {
            "task": task.task,
            "output": own.envelope,
            "opening": digest_of(own.opening),
            "targets": tuple(t.envelope for t in targets),
            "target_openings": tuple(digest_of(t.opening) for t in targets),
        }
        attached = [own.opening, *[t.opening for t in targets]]
        return self.enter(own.author, (kind, fields), attachments=attached)

    def tick(self, validator: str) -> Applied:
        """A validator marks a size."""
        return self.enter(validator, (Tick, {"size": self.state.size}))


def digest_of(opening: bytes) -> bytes:
    """How an entry names an opening."""
    return hashlib.sha256(opening).digest()


def stance_letter(accepted: Signed, other: Signed) -> str:
    """The letter of an output against the accepted one."""
    x, y = (Candidate(s.author, tuple(t.data for t in s.tensors)) for s in (accepted, other))
    return LETTERS[stance(distance(x, y, TOLERANCES))]
