"""An S3-compatible server in a process of its own, and a proxy before it that does to requests what networks do."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow.fs as pafs

HOST = "127.0.0.1"
BUCKET = "bucket"
KEY, SECRET = "AKEXAMPLE", "s+cr/et-of-nobody"
FAULTS = ("busy", "cut request", "cut response", "no response")
"""What may happen to a request: 503 SlowDown; its connection ends in the middle of its body, and the server never sees
it; in the middle of the response, or before it, when the server has done what it was asked for."""
BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
QUOTED = "s%2Bcr%2Fet-of-nobody"
"""The secret as a URI has it."""


def uri(port: int, path: str) -> str:
    """What opens a path of the bucket through a port of this machine."""
    return f"s3://{KEY}:{QUOTED}@{BUCKET}/{path}?endpoint_override={HOST}:{port}&scheme=http"


# --- the server ----------------------------------------------------------------------------------------


class Server:
    """moto's S3 in a process of its own, which ends with this one at the latest; it has one empty bucket."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3"],
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.filesystem = pafs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"{HOST}:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.filesystem.create_dir(BUCKET)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile it takes connections, as the kernel does for it, and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def request(self, method: str, target: str, body: bytes = b"") -> bytes:
        """The answer to a request that no library makes."""
        connection = HTTPConnection(HOST, self.port, timeout=20)
        try:
            connection.request(method, target, body)
            return connection.getresponse().read()
        finally:
            connection.close()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def serve() -> None:
    """Serve until the process that has started this one ends, or ends this one."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, 0, verbose=False)
    with contextlib.redirect_stdout(sys.stderr):
        server.start()
        port = server.get_host_and_port()[1]
    print(port, flush=True)
    sys.stdin.read()


# --- the proxy -----------------------------------------------------------------------------------------


class Proxy:
    """Hands requests on to a server, and does to a share of them what networks and busy servers do.

    Attributes:
        shares: the share of requests that meets each of `FAULTS`; which ones, the seed says. At most `in_a_row` of
            them come one after the other.
        methods: the only ones that faults happen to, where there are any.
        delay: seconds before each response.
        before: called with the method and the target of each request, before anything happens to it.
        requests: how many have come, by method and by what became of them.
    """

    def __init__(self, server: Server, seed: int = 0) -> None:
        self.server = server
        self.shares: dict[str, float] = {}
        self.methods: tuple[str, ...] = ()
        self.in_a_row = sys.maxsize
        self.delay = 0.0
        self.before: Callable[[str, str], None] = lambda method, target: None
        self.requests: Counter[tuple[str, str]] = Counter()
        self._random = random.Random(seed)
        self._row = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._away = False
        self._listen(0)
        self.port: int = self._http.server_address[1]

    def uri(self, path: str) -> str:
        """What opens a path of the bucket through this proxy."""
        return uri(self.port, path)

    @contextlib.contextmanager
    def faulty(self, *methods: str, in_a_row: int = sys.maxsize, **shares: float) -> Iterator[None]:
        """Meanwhile shares of the requests, of all or of some methods, meet faults: busy=0.2, cut_request=1.0."""
        shares = {name.replace("_", " "): share for name, share in shares.items()}
        assert shares.keys() <= set(FAULTS)
        self.shares, self.methods, self.in_a_row = shares, methods, in_a_row
        try:
            yield
        finally:
            self.shares = {}

    def go_away(self) -> None:
        """From now on nobody listens, and what was connected is not."""
        with self._lock:
            self._away = True
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Listen again, on the same port."""
        self._away = False
        self._listen(self.port)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Meanwhile connections are refused."""
        self.go_away()
        try:
            yield
        finally:
            self.come_back()

    def end(self) -> None:
        """Close everything."""
        if not self._away:
            self.go_away()

    def count(self, fault: str) -> int:
        """How many requests have met a fault."""
        return sum(number for (_, what), number in self.requests.items() if what == fault)

    # --- for its handlers ------------------------------------------------------------------------------

    def draw(self, method: str) -> str:
        """What becomes of a request: one of `FAULTS`, or "fine"."""
        with self._lock:
            chosen = "fine"
            if not self.methods or method in self.methods:
                at = self._random.random()
                for fault, share in self.shares.items():
                    if at < share:
                        chosen = fault
                        break
                    at -= share
            chosen = "fine" if self._row >= self.in_a_row else chosen
            self._row = 0 if chosen == "fine" else self._row + 1
            self.requests[method, chosen] += 1
            return chosen

    def connected(self, connection: socket.socket, *, open: bool) -> None:
        """Note a connection that is open, or is so no more."""
        with self._lock:
            (self._open.add if open else self._open.discard)(connection)
            if open and self._away:
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, port: int) -> None:
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self._http = _Listener((HOST, port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ends is nothing to speak of."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.faults.connected(self.connection, open=True)
        self._server = HTTPConnection(HOST, self.faults.server.port, timeout=120)

    def finish(self) -> None:
        self._server.close()
        self.faults.connected(self.connection, open=False)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to be read."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_request(self) -> None:
        self.faults.before(self.command, self.path)
        fault = self.faults.draw(self.command)
        if fault == "cut request":
            self._body(share=0.5)
            self.close_connection = True
            return
        body = self._body()
        if fault == "busy":
            self._answer(503, [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))], BUSY)
            return
        response, content = self._ask(body)
        if self.faults.delay:
            threading.Event().wait(self.faults.delay)
        if fault == "no response" or (fault == "cut response" and not content):
            self.close_connection = True
            return
        headers = [(name, value) for name, value in response.getheaders() if name.lower() != "connection"]
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers = [each for each in headers if each[0].lower() != "transfer-encoding"]
            headers.append(("Content-Length", str(len(content))))
        if fault == "cut response":
            self.close_connection = True
            self._answer(response.status, headers, content[: len(content) // 2])
            return
        self._answer(response.status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_request  # noqa: N815 the names are http.server's

    def _body(self, share: float = 1.0) -> bytes:
        """A share of the request's body, as it is sent: where that is in chunks, with their heads."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * share))
        pieces = []
        while True:
            head = self.rfile.readline()
            size = int(head.split(b";")[0], 16)
            pieces.append(head + (self.rfile.read(int(size * share)) if share < 1 else self.rfile.read(size + 2)))
            if share < 1 or not size:
                return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Ask the server; a second time where it has closed a connection that nothing had come through yet."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        try:
            self._server.request(self.command, self.path, body, headers)
            response = self._server.getresponse()
        except (OSError, HTTPException):
            self._server.close()
            self._server.request(self.command, self.path, body, headers)
            response = self._server.getresponse()
        return response, response.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}", *(": ".join(each) for each in headers)]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + content * (self.command != "HEAD"))


if __name__ == "__main__":
    serve()
