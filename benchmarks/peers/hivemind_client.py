"""hivemind's client: runs in .venv-hivemind, `hivemind_client.py EXPERT.onnx WINDOWS.npy READY.json`.

It takes the commands of `benchmarks.bench.worker` and measures by the same rules: so many calls in flight, each followed
by the next, inputs that no call before had. The calls are those of hivemind's RemoteExpert, as coroutines on its own
event loop: no thread a call.
"""

import asyncio
import itertools
import json
import os
import sys
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnxruntime
import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.dht import DHT
from hivemind.moe.client.expert import RemoteExpert, expert_forward
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.p2p import PeerID

TOLERANCE = 1e-4
SAMPLES = 4


class Client:
    """The connection, the windows, and the calls made so far."""

    def __init__(self, model: str, windows: str, ready: str) -> None:
        with open(ready) as file:
            said = json.load(file)
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._windows = np.load(windows)
        self._numbers = itertools.count()
        dht = DHT(initial_peers=said["addresses"], client_mode=True, start=True)
        p2p = RemoteExpertWorker.run_coroutine(dht.replicate_p2p())
        self._expert = RemoteExpert(ExpertInfo(said["uid"], PeerID.from_base58(said["peer"])), p2p)
        self._schema, self._stub = self._expert.info["forward_schema"][0][0], self._expert.stub

    def load(self, command: dict) -> dict:
        """One phase."""
        return RemoteExpertWorker.run_coroutine(self._load(command))

    async def _load(self, command: dict) -> dict:
        rows, seconds = command["rows"], command["seconds"]
        begin = time.perf_counter() + command["warm_s"]
        end, done = begin + seconds, 0
        latencies: list[float] = []
        samples: list[tuple[np.ndarray, np.ndarray]] = []

        async def one() -> None:
            """One client that asks again and again until the end; it counts only what is answered within the time."""
            nonlocal done
            while (sent := time.perf_counter()) < end:
                inputs = self._inputs(rows)
                tensor = torch.from_numpy(inputs)
                serialized = (serialize_torch_tensor(tensor, self._schema.compression),)
                (output,) = await expert_forward(self._expert.uid, (tensor,), serialized, self._stub)
                now = time.perf_counter()
                done += 1
                if begin <= now < end:
                    latencies.append(1000 * (now - sent))
                if len(samples) < SAMPLES:
                    samples.append((inputs, output.numpy()))

        await asyncio.gather(*(one() for _ in range(command["connections"])))
        return {
            "done": done, "seconds": seconds, "latencies_ms": latencies, "errors": {}, "wrong": self._wrong(samples),
            "request_bytes": 4 * self._windows[0].size * rows,
        }  # fmt: skip

    def _inputs(self, rows: int) -> np.ndarray:
        number = next(self._numbers)
        start = number * rows % (len(self._windows) - rows)
        inputs = self._windows[start : start + rows].copy()
        inputs.reshape(rows, -1)[:, 0] = 0.25 + (number * rows + np.arange(rows)) % (1 << 23) / (1 << 24)
        return inputs

    def _wrong(self, samples: list) -> list:
        off = [float(np.abs(self._session.run(None, {"window": x})[0] - y).max()) for x, y in samples]
        return [f"an answer is off by {value:g}" for value in off if not value <= TOLERANCE]


def main() -> None:
    """Serve commands until the input ends."""
    torch.set_num_threads(1)
    client = Client(*sys.argv[1:])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            said = client.load(json.loads(line))
        except Exception as error:  # whatever hivemind raises is the other side's to report
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
