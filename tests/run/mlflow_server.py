"""A real MLflow server on a loopback port, to be hung, killed and started again; a bad network."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.jobs.launching import free_port


class MLflowServer:
    """`mlflow server` over a SQLite file in `folder`; a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = int(free_port())
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "MLflowServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it answers."""
        store = f"sqlite:///{self.folder}/mlflow.db"
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--backend-store-uri", store, "--artifacts-destination", str(self.folder)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "mlflow", "server", *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL it and its workers, hung or not."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        """SIGSTOP hangs it: connections are accepted by the kernel and never answered."""
        os.killpg(self.process.pid, number)

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


class BadNetwork:
    """A proxy in front of a server; a context manager.

    Attributes:
        loses: what becomes of a `log-batch` call: "nothing" is lost, its "request" never arrives,
            or its "answer" never comes back.
        lost: set when it lost one.
        fails: what becomes of every second call of any kind: "nothing", a "refusal" (503, not
            executed), a "cut" (executed, the connection closed without an answer).
        waits: seconds between calls that it asks for with 429 and Retry-After; 0: none.
        status: with which it answers every call instead of forwarding it; None: it forwards.
    """

    def __init__(self, port: int):
        network = self
        self.loses, self.lost, self._over = "nothing", threading.Event(), threading.Event()
        self.fails, self.waits, self.status = "nothing", 0, None
        self.calls = self.early = 0
        self._last = 0.0

        class Handler(BaseHTTPRequestHandler):
            def refuse(self, status: int, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def is_refused(self) -> bool:
                network.calls += 1
                now, last = time.monotonic(), network._last
                if network.status:
                    self.refuse(network.status)
                elif network.fails == "refusal" and network.calls % 2:
                    self.refuse(503)
                elif now - last < network.waits:
                    network.early += 1
                    self.refuse(429, Retry_After=str(network.waits))
                else:
                    network._last = now
                    return False
                return True

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.is_refused():
                    return
                loses = network.loses if self.path.endswith("log-batch") else "nothing"
                if loses != "request":
                    upstream = http.client.HTTPConnection("127.0.0.1", port)
                    headers = {k: v for k, v in self.headers.items() if k != "Host"}
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                    upstream.close()
                if loses != "nothing":
                    network.lost.set()
                    network._over.wait()
                    return
                if network.fails == "cut" and network.calls % 2:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = forward

            def log_message(self, *_: object) -> None: ...

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._proxy.server_port}"

    def __enter__(self) -> "BadNetwork":
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._proxy.shutdown()
        self._proxy.server_close()
