"""KServe serves the expert: runs in .venv-kserve, `kserve_server.py EXPERT.onnx READY.json PORT`, until SIGTERM.

A custom Model on KServe's own server and v2 endpoint, one worker, answering in the form it was asked in.
"""

import json
import logging
import os
import socket
import sys
import threading
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Expert(Model):
    """The expert behind KServe's protocol."""

    def __init__(self, path: str) -> None:
        super().__init__("expert")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:  # type: ignore[no-untyped-def]
        """float32 [rows, 6, 100] to float32 [rows, 7]."""
        values = self._session.run(None, {"window": payload.inputs[0].as_numpy()})[0]
        output = InferOutput("probabilities", list(values.shape), "FP32")
        output.set_data_from_numpy(values, binary_data=bool((payload.parameters or {}).get("binary_data_output")))
        return InferResponse(payload.id or "0", self.name, [output])


def announce(port: int, ready: str) -> None:
    """Write READY.json once the port answers."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    with open(f"{ready}.new", "w") as file:
        json.dump({"url": f"http://127.0.0.1:{port}"}, file)
    os.replace(f"{ready}.new", ready)


def main() -> None:
    """Serve on loopback, which KServe has no setting for, and without a line a request, which Ray and we write none of."""
    model, ready, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = uvicorn.Config
    uvicorn.Config = lambda app, **given: config(app, **{**given, "host": "127.0.0.1"})  # type: ignore[assignment, misc]
    threading.Thread(target=announce, args=(port, ready), daemon=True).start()
    server = ModelServer(http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False)
    for name in ("kserve.trace", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([Expert(model)])


if __name__ == "__main__":
    main()
