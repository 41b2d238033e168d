"""Flower alone: the same bytes in one message to the same number of SuperNodes, stored and acknowledged. No checks.

Two times: from the push to the last acknowledgement, as its ServerApp takes it, with a SuperLink and SuperNodes that run
already; and the same with their start, as a release has it that starts them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.processes import Running, finish, spawn
from bmoe.protocol.errors import UnavailableError
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.flower.layout import app_files, flower_program

UP_S, RUN_S = 120.0, 240.0
SERVER = """import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    data = Path(str(config["file"])).read_bytes()
    while len(nodes := list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.5)
    began = time.time()
    messages = [
        Message(RecordDict({"file": ConfigRecord({"data": data})}), dst_node_id=node, message_type="query.keep")
        for node in nodes
    ]
    waiting = set(grid.push_messages(messages))
    good = 0
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            good += not reply.has_error() and int(reply.content["ack"]["size"]) == len(data)
        time.sleep(0.1)
    Path(str(config["out"])).write_text(json.dumps({"seconds": time.time() - began, "good": good}))
"""
CLIENT = """from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("keep")
def keep(message, context):
    data = message.content["file"]["data"]
    Path(str(context.node_config["file"])).write_bytes(data)
    return Message(RecordDict({"ack": ConfigRecord({"size": len(data)})}), reply_to=message)
"""


async def bare_seconds(root: Path, file: Path, count: int) -> tuple[float, float]:
    """Seconds to the last acknowledgement of a file by `count` SuperNodes: from its push, from the start of the SuperLink."""
    began = time.monotonic()
    app = root / "app"
    (app / "bare").mkdir(parents=True)
    config = 'file = ""\nout = ""\nnodes = 1'
    for name, text in app_files("bare", "One message with some bytes, acknowledged", SERVER, CLIENT, config).items():
        (app / name).write_text(text)
    ports = claim_ports(root, {"superlink": Listen(), **{f"node-{i}": Listen() for i in range(count)}})
    address = f"127.0.0.1:{ports['superlink']}"
    home = root / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bare"\n\n[superlink.bare]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(flower_program('flwr')).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    running: list[Running] = []
    try:
        argv = (
            flower_program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(ports["superlink"]),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        running.append(await spawn("superlink", argv, root / "superlink.log", extra=environment))
        for i in range(count):
            argv = (
                flower_program("flower-supernode"), "--insecure", "--superlink", address, "--host", "127.0.0.1",
                "--port", str(ports[f"node-{i}"]), "--node-config", f'file="{root / f"kept-{i}"}"',
            )  # fmt: skip
            running.append(await spawn(f"node-{i}", argv, root / f"node-{i}.log", extra=environment))
        pushed = await _run(root, app, file, count, environment)
        return pushed, time.monotonic() - began
    finally:
        await asyncio.gather(*(child.stop(10) for child in reversed(running)))


async def _run(root: Path, app: Path, file: Path, count: int, environment: Mapping[str, str]) -> float:
    out = root / "out.json"
    deadline = time.monotonic() + UP_S + RUN_S
    argv = (
        flower_program("flwr"), "run", str(app), "bare",
        "--run-config", f'file="{file.resolve()}" out="{out}" nodes={count}',
    )  # fmt: skip
    while True:  # the SuperLink takes some seconds to listen
        child = await spawn("flwr", argv, root / "run.log", extra=environment)
        if await finish(child, 60) == 0:
            break
        if time.monotonic() > deadline:
            raise UnavailableError(f"flwr run failed; log {root / 'run.log'}")
    while not out.exists():
        if time.monotonic() > deadline:
            raise UnavailableError(f"Flower alone did not carry {file} to {count} nodes; logs under {root}")
        await asyncio.sleep(0.2)
    await asyncio.sleep(0.2)
    found = json.loads(out.read_text())
    if found["good"] != count:
        raise UnavailableError(f"Flower alone: {found['good']} of {count} nodes acknowledged; logs under {root}")
    return float(found["seconds"])
