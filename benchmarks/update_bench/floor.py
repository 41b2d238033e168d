"""The floor: the same bytes fetched as often by plain HTTP over loopback, at once, from a server of a few lines."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROUNDS = 5


def floor_seconds(size: int, count: int) -> float:
    """The fastest of some rounds, in each of which `count` clients fetch `size` bytes at the same time."""
    data = bytes(size)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def fetch() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
        connection.request("GET", "/")
        assert len(connection.getresponse().read()) == size
        connection.close()

    best = float("inf")
    try:
        for _ in range(ROUNDS):
            threads = [threading.Thread(target=fetch) for _ in range(count)]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = min(best, time.monotonic() - began)
    finally:
        server.shutdown()
        server.server_close()
    return best
