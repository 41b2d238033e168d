"""hivemind serves the expert: runs in .venv-hivemind, `hivemind_server.py EXPERT.onnx READY.json`, until SIGTERM.

A torch module around the onnxruntime session, so that everybody's arithmetic is the same; hivemind batches requests by
itself. Everything else is at its default (one handler process or eight made no difference on two cores).
"""

import json
import os
import signal
import sys
import threading

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
import torch
from hivemind.moe import Server
from hivemind.moe.server.layers import name_to_block, name_to_input

UID = "expert.0"
ROW = (6, 100)


def main() -> None:
    """Serve."""
    torch.set_num_threads(1)
    model, ready = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    class Expert(torch.nn.Module):
        """The expert; float32 [rows, 6, 100] to float32 [rows, 7]."""

        def __init__(self, hidden: int) -> None:
            super().__init__()

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            """Probabilities [N, classes] of windows [N, *ROW], by onnxruntime."""
            return torch.from_numpy(session.run(None, {"window": windows.numpy()})[0])

    name_to_block["onnx"], name_to_input["onnx"] = Expert, lambda rows, hidden: torch.empty((rows, *ROW))
    server = Server.create(
        expert_uids=[UID], expert_cls="onnx", hidden_dim=1, device="cpu", optim_cls=None,
        start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
    )  # fmt: skip
    said = {"uid": UID, "peer": str(server.dht.peer_id), "addresses": [str(a) for a in server.dht.get_visible_maddrs()]}
    with open(f"{ready}.new", "w") as file:
        json.dump(said, file)
    os.replace(f"{ready}.new", ready)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    stopping.wait()
    server.shutdown()


if __name__ == "__main__":
    main()
