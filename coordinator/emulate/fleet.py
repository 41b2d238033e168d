"""A throwaway fleet: a gateway of its own, agents of this machine and of emulated boards, all children of this process.

Everything lies under one folder: state/ (the gateway's), NAME/ (an agent's), NAME.log, models/ (copies that were given a
manifest). Nothing outlives this process, and an agent not the thread that added it: processes of Linux die with theirs.

    with Fleet(folder, models=["my-model"]) as fleet:
        fleet.add("native")
        fleet.add("pi", board)
        fleet.online()
        fleet.client().infer("my-model", inputs, policy="full")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bmoe.client import Client
from bmoe.inference.runner import PACKAGE_ROOT
from bmoe.ledger.rules.entries import Verdict
from bmoe.ledger.rules.policies.ballot import IGNORED, LETTERS, UNUSABLE
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.protocol.errors import ConfigError, UnavailableError
from bmoe.protocol.messages import Output, open_message
from bmoe.storage.manifest import MANIFEST_NAME, Model
from coordinator.cli.admin import Admin
from coordinator.cli.commands import api_url
from coordinator.embedded import launch
from coordinator.emulate.board import EmulatedBoard
from coordinator.state_layout import StateLayout

GATEWAY, STATE, MODELS = "gateway", "state", "models"
TAKEN = (GATEWAY, STATE, MODELS)  # names of files and folders that are no agent's
UP_WITHIN_S = 90.0
JOIN_WITHIN_S = 120.0
ONLINE_WITHIN_S = 180.0
FAREWELL_S = 10.0
POLL_S = 0.1
TAIL_BYTES = 2000
STANCES = {letter: stance.value for stance, letter in LETTERS.items()} | {UNUSABLE: "unusable", IGNORED: "ignored"}
COMMANDS = {
    "bmoe": (sys.executable, "-c", "import sys; from coordinator.cli import main; sys.exit(main())"),
    "bmoe-agent": (sys.executable, "-c", "import sys; from edge_agent.cli import main; sys.exit(main())"),
}
# Under emulation a task takes up to two hundred times as long as on such a board, and several share this machine.
PATIENT = {"BMOE_TASK_TIMEOUT_MS": "120000", "BMOE_HEDGE_MIN_MS": "60000", "BMOE_PROMISE_MS": "300000"}


class Fleet:
    """One gateway and its agents. Leaving the context stops every process; the files are the caller's.

    `models`: folders or names of built-in models that the gateway comes up with. `settings`: BMOE_* variables of it.
    Every method raises UnavailableError, with the last words of whichever process failed.
    """

    def __init__(
        self, folder: Path, models: Sequence[str | Path] = (), settings: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(folder).resolve()  # its processes run in it
        self.state = self.folder / STATE
        self.models = [str(Path(model).resolve()) if Path(model).is_dir() else str(model) for model in models]
        self.settings = {**PATIENT, **(settings or {})}
        self.agents: dict[str, tuple[str, ...]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: list[Client] = []

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Bring the gateway up; returns when it can infer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = [word for model in self.models for word in ("--model", model)]
        try:
            self._spawn(GATEWAY, (*COMMANDS["bmoe"], "up", "--state", str(self.state), *flags), GATEWAY)
            self._until(self._ready, UP_WITHIN_S, lambda: "the gateway did not come up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process, agents first, so that their farewells still find the broker."""
        agents = [child for name, child in self._running.items() if name != GATEWAY]
        for children in (agents, [c for n, c in self._running.items() if n == GATEWAY]):
            for child in children:
                child.terminate()
            for child in children:
                try:
                    child.wait(FAREWELL_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        for client in self._clients:
            client.close()

    def client(self) -> Client:
        """A new client of the gateway, closed with the fleet at the latest."""
        self._clients.append(self._client())
        return self._clients[-1]

    def _client(self) -> Client:
        return Client(api_url(self.state), timeout_s=300.0)

    def add(self, name: str, board: EmulatedBoard | None = None, *, owner: str = "") -> None:
        """Join an agent, of this machine or of an emulated board, and start it; `online` waits for it."""
        self.add_all({name: board}, owner=owner)

    def add_all(self, agents: Mapping[str, EmulatedBoard | None], *, owner: str = "") -> None:
        """Join and start several, at once: each of an owner of its own where none is named.

        Raises ConfigError for a name that is taken, and what the gateway says of one that is none.
        """
        for name in agents:
            if name in TAKEN or name in self.agents:
                raise ConfigError(f"the name {name!r} is taken in this fleet: give the agent another")
        commands = {name: board.agent if board else COMMANDS["bmoe-agent"] for name, board in agents.items()}
        for name, command in commands.items():
            body = {"name": name, "owner": owner or f"owner-of-{name}", "batch": "emulated", "ttl_s": 3600}
            token = Admin(self.state).call("POST", "/v1/admin/tokens", body)["token"]
            self._spawn(_joining(name), (*command, "join", token, "--state", str(self.folder / name)), name)
        deadline = time.monotonic() + JOIN_WITHIN_S
        for name, command in commands.items():
            self._joined(name, deadline)
            self.agents[name] = (*command, "run", "--state", str(self.folder / name))
            self.run(name)

    def _joined(self, name: str, deadline: float) -> None:
        joining = self._running[_joining(name)]
        try:
            status = joining.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            joining.kill()
            status = joining.wait()
        del self._running[_joining(name)]
        if status != 0:
            raise UnavailableError(f"{name} could not join (status {status}): {self.tail(name)}")

    def run(self, name: str) -> None:
        """Start an agent that has joined."""
        self._spawn(name, self.agents[name], name)

    def kill(self, name: str) -> None:
        """SIGKILL an agent; `offline` waits until the gateway knows, `run` starts it again."""
        self._running[name].kill()
        self._running.pop(name).wait()

    def offline(self, name: str, within_s: float = ONLINE_WITHIN_S) -> None:
        """Wait until the gateway holds an agent to be offline."""
        with contextlib.closing(self._client()) as client:
            self._until(
                lambda: any(row["agent"] == name and not row["online"] for row in client.fleet()),
                within_s,
                lambda: f"{name} did not go offline",
            )

    def online(self, within_s: float = ONLINE_WITHIN_S) -> list[dict[str, Any]]:
        """Wait until every agent added is online; the gateway's row of each."""
        with contextlib.closing(self._client()) as client:
            rows: dict[str, dict[str, Any]] = {}

            def all_there() -> bool:
                rows.update({row["agent"]: row for row in client.fleet()})
                return all(rows.get(name, {}).get("online") for name in self.agents)

            self._until(all_there, within_s, lambda: f"not all of {', '.join(self.agents)} came online")
        return [rows[name] for name in self.agents]

    def publish(self, folder: Path) -> str:
        """Have the model in a folder served; its name. Without a manifest one is made, of a copy, for this fleet."""
        from coordinator.models.publish import publish

        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder: a model lies in one, with its .onnx files")
        if not (folder / MANIFEST_NAME).exists():
            folder = shutil.copytree(folder, self.folder / MODELS / folder.resolve().name, dirs_exist_ok=True)
            draft_manifest(folder)
        return str(publish(self.state, folder, "emulation")["model"])

    def stances(self, verdict: str) -> dict[str, str]:
        """How each agent's output stood in a verdict, by a receipt that is checked here: agree, neutral, dissent, unusable,
        or ignored where nothing was accepted.

        Raises ProofError for a receipt that does not hold.
        """
        with contextlib.closing(self._client()) as client:
            receipt = client.verdict_receipt(verdict)
        entry = verify_receipt(receipt, StateLayout(self.state).load_trust()).entry
        assert isinstance(entry, Verdict)
        authors = [open_message(Output, envelope).header.author for envelope in entry.outputs]
        return {author: STANCES[letter] for author, letter in zip(authors, entry.stances, strict=True)}

    def tail(self, name: str) -> str:
        """The last words of one process."""
        try:
            return self.log(name).read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return ""

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.folder / f"{name}.log"

    def _ready(self) -> bool:
        try:
            with contextlib.closing(self._client()) as client:
                return client.ready()
        except (ConfigError, UnavailableError):  # no port is known yet, or nobody listens yet
            return False

    def _until(self, done: Callable[[], bool], within_s: float, complaint: Callable[[], str]) -> None:
        deadline = time.monotonic() + within_s
        while not done():
            for name, child in self._running.items():
                if child.poll() is not None:
                    raise UnavailableError(f"{name} ended with status {child.returncode}: {self.tail(name)}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{complaint()} within {within_s:g} s; logs: {self.folder}")
            time.sleep(POLL_S)

    def _spawn(self, name: str, argv: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        with self.log(log).open("ab") as file:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *argv],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._environment(),
                start_new_session=True,  # a terminal's Ctrl-C is for us to act on, in our order
            )  # fmt: skip
        self._running[name] = child
        return child

    def _environment(self) -> dict[str, str]:
        """Ours without settings of the caller's shell; one thread each, for all share this machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BMOE_")}
        if PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):
            kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), kept.get("PYTHONPATH")]))
        return kept | self.settings | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _joining(name: str) -> str:
    return f"{name} join"


def draft_manifest(folder: Path) -> Model:
    """Write model.json for the ONNX files of a folder, as `bmoe model init` does. Raises BmoeError.

    In a thread of its own, for a caller whose event loop is running.
    """
    from coordinator.models.draft import Wishes, draft
    from coordinator.models.trial import Lab

    async def write() -> Model:
        async with Lab() as lab:
            return await draft(folder, Wishes(), lambda line: None, lab)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, write()).result()
