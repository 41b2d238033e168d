"""The client of the demonstration: sends held-out windows over HTTP and scores the answers against the labels.

A process of its own, as a user's would be: it knows a URL and `bmoe.client`. It prints {"total"}, the windows to be
sent, then one JSON line an answer: {"rows", "correct", "request", "ms"} or {"rows", "error"}.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from typing import Any

import numpy as np

from benchmarks.demo.windows import INPUT, MODEL, OUTPUT, held_out
from bmoe.client import Client
from bmoe.protocol.errors import BmoeError

Batch = tuple[np.ndarray, np.ndarray]


def batches(rows: int, count: int, seed: int) -> list[Batch]:
    """The first `count` held-out windows (0: all) in the seed's order, cut into requests of `rows`."""
    windows, labels = held_out()
    order = np.random.default_rng(seed).permutation(len(labels))[: count or None]
    return [(windows[part], labels[part]) for part in np.split(order, range(rows, len(order), rows))]


def ask(client: Client, policy: str, batch: Batch) -> dict[str, Any]:
    """Send one request; what came of it."""
    windows, labels = batch
    began = time.monotonic()
    try:
        answer = client.infer(MODEL, {INPUT: windows}, policy=policy)
    except BmoeError as error:
        return {"rows": len(labels), "error": str(error)}
    found = answer.outputs[OUTPUT].argmax(axis=1)
    took_ms = round(1000 * (time.monotonic() - began), 1)
    return {"rows": len(labels), "correct": int((found == labels).sum()), "request": answer.request, "ms": took_ms}


def send_all(url: str, policy: str, todo: list[Batch], connections: int) -> None:
    """Send every request, `connections` at a time, each on a connection of its own; a line as each is answered."""
    waiting: queue.SimpleQueue[Batch] = queue.SimpleQueue()
    for batch in todo:
        waiting.put(batch)
    writing = threading.Lock()

    def work() -> None:
        client = Client(url)
        while True:
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                return client.close()
            line = json.dumps(ask(client, policy, batch))
            with writing:
                print(line, flush=True)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when the windows cannot be had; unanswered requests are lines, not a status."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo.client", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--rows", type=int, required=True, help="windows in one request")
    parser.add_argument("--count", type=int, default=0, help="windows to send; 0 sends all")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="the order in which they are sent")
    given = parser.parse_args(argv)
    try:
        todo = batches(given.rows, given.count, given.seed)
    except BmoeError as error:
        print(f"client: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"total": sum(len(labels) for _, labels in todo)}), flush=True)
    send_all(given.url, given.policy, todo, given.connections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
