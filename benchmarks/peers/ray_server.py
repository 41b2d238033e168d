"""Ray Serve serves the expert: runs in .venv-ray, `ray_server.py EXPERT.onnx READY.json PORT FOLDER`, until SIGTERM.

One replica behind Ray Serve's HTTP proxy; bodies are raw float32, the cheapest form to parse.
"""

import json
import os
import signal
import sys
import threading

os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

IN_FLIGHT = 64
ROW = (6, 100)
# A line a request would be written at our cost and measured as theirs.
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@serve.deployment(num_replicas=1, max_ongoing_requests=IN_FLIGHT, logging_config=QUIET)
class Expert:
    """The expert: float32 [rows, 6, 100] to float32 [rows, 7], both as raw bytes."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def __call__(self, request: Request) -> Response:
        windows = np.frombuffer(await request.body(), "<f4").reshape(-1, *ROW)
        values = self._session.run(None, {"window": windows})[0]
        return Response(values.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve."""
    model, ready, port, folder = sys.argv[1:]
    stopping = threading.Event()
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config=QUIET)
    serve.run(Expert.bind(model), route_prefix="/")  # type: ignore[attr-defined]
    with open(f"{ready}.new", "w") as file:
        json.dump({"url": f"http://127.0.0.1:{port}"}, file)
    os.replace(f"{ready}.new", ready)
    stopping.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
