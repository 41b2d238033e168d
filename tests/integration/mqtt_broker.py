"""A nats-server for tests of what speaks MQTT: mutual TLS, a few users by certificate, killed and started at will."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sysconfig
from pathlib import Path

from certs import Authority, issue

from bmoe.protocol.link import LinkSettings

CONFIG = """
server_name: test
listen: "127.0.0.1:{client_port}"
jetstream {{ store_dir: "{store}" }}
max_payload: 8MB
accounts {{ FLEET: {{ jetstream: enabled, users: [
  {users}
  {{ user: "CN=deaf", permissions: {{ publish: [">"], subscribe: {{ deny: "bmoe.v1.>" }} }} }} ] }} }}
mqtt {{
  listen: "0.0.0.0:{port}"
  tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{ca}", verify_and_map: true, timeout: 5 }}
}}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Broker:
    """A nats-server that can die at any moment and come back on the same port."""

    def __init__(self, folder: Path, authority: Authority, users: tuple[str, ...] = ("one", "two")) -> None:
        self.folder, self.authority, self.port = folder, authority, free_port()
        cert, key = issue(authority, "broker", server=True)
        self.config = folder / "nats.conf"
        self.config.write_text(
            CONFIG.format(
                users="".join(f'{{ user: "CN={name}" }}, ' for name in users),
                client_port=free_port(),
                store=folder / "store",
                port=self.port,
                cert=cert,
                key=key,
                ca=authority.ca,
            )
        )
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        binary = Path(sysconfig.get_path("scripts")) / "nats-server"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220 (it must die in code that does not wait)
                [binary, "-c", self.config], stdout=log, stderr=log
            )
        for _ in range(500):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.01)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def settings(self, name: str, authority: Authority | None = None) -> LinkSettings:
        cert, key = issue(authority or self.authority, name)
        return LinkSettings(
            "127.0.0.1", self.port, name, self.authority.ca, cert, key, backoff_min_s=0.02, backoff_max_s=0.1
        )
