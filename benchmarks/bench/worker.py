"""The client's process: `python -m benchmarks.bench.worker FOLDER` does what lines of JSON on its input say, in turn.

FOLDER is the model's, for running it here.

{"do": "load", "url", "path", "encoding", "parameters", "rows", "connections", "warm_s", "seconds"} asks a server;
{"do": "in_process", "rows", "seconds"} runs the model here. Each is answered by one line, a failure by {"error"}.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.bench.bodies import Template, first_output, template
from benchmarks.bench.closed_loop import Run, run
from benchmarks.bench.inprocess import InProcess, run_in_process
from benchmarks.demo.windows import INPUT, held_out
from bmoe.protocol.errors import BmoeError

# How many different batches of real windows a phase goes round; with the slots filled, no two requests are the same.
BATCHES = 32
TOLERANCE = 1e-4


class Worker:
    """The windows, the model and the requests made so far."""

    def __init__(self, folder: Path) -> None:
        windows, _ = held_out()
        self._windows = windows[np.random.default_rng(0).permutation(len(windows))]
        self._model = InProcess(folder)
        self._templates: dict[str, list[Template]] = {}
        self._numbers = itertools.count()

    def load(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a server in a closed loop; some answers are compared with what onnxruntime says here."""
        address = urlsplit(command["url"])
        templates = self._made(command, address.netloc)

        def next_request() -> tuple[int, bytes]:
            number = next(self._numbers)
            return number, templates[number % len(templates)].fill(number)

        seen = asyncio.run(
            run(
                address.hostname or "", address.port or 80, next_request, command["connections"], command["warm_s"],
                command["seconds"],
            )
        )  # fmt: skip
        return {
            "done": seen.done,
            "seconds": seen.seconds,
            "latencies_ms": [round(value, 3) for value in seen.latencies_ms],
            "errors": dict(seen.errors),
            "wrong": self._wrong(seen, templates),
            "request_bytes": len(templates[0].fill(0)),
        }

    def in_process(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model here."""
        batches = self._batches(command["rows"])
        before = time.process_time()
        latencies = run_in_process(self._model, batches, command["seconds"])
        cpu_s = time.process_time() - before
        return {"done": len(latencies), "seconds": command["seconds"], "latencies_ms": latencies, "cpu_s": cpu_s}

    def _batches(self, rows: int) -> list[np.ndarray]:
        count = min(BATCHES, len(self._windows) // rows)
        return [self._windows[i * rows : (i + 1) * rows] for i in range(count)]

    def _made(self, command: Mapping[str, Any], host: str) -> list[Template]:
        path, encoding, parameters = command["path"], command["encoding"], command["parameters"]
        key = json.dumps([host, path, encoding, parameters, command["rows"]])
        if key not in self._templates:
            self._templates[key] = [
                template(batch, INPUT, encoding, path, parameters, host) for batch in self._batches(command["rows"])
            ]
        return self._templates[key]

    def _wrong(self, seen: Run, templates: list[Template]) -> list[str]:
        """What differs by more than TOLERANCE from plain onnxruntime, among the answers kept."""
        found = []
        for number, headers, body in seen.samples:
            expected = self._model.answer(templates[number % len(templates)].inputs(number))
            got = first_output(headers, body)
            fits = got.shape in (expected.shape, (expected.size,))
            off = float(np.abs(got.reshape(expected.shape) - expected).max()) if fits else float("inf")
            if not off <= TOLERANCE:
                found.append(f"request {number} is off by {off:g}")
        return found


def main() -> int:
    """Serve until the input ends."""
    try:
        worker = Worker(Path(sys.argv[1]))
    except BmoeError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            said = {"load": worker.load, "in_process": worker.in_process}[command["do"]](command)
        except (BmoeError, OSError) as error:
            said = {"error": str(error)}
        print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
