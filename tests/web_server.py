"""A loopback web server that serves files as it is told to, and breaks off where it is told to."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class File:
    """What an address holds.

    Attributes:
        content: its bytes.
        tag: the ETag; empty for none.
        ranges: whether parts of it can be asked for.
        breaks: after how many bytes of the body the connection ends, one a request.
        length: whether the server tells how long it is.
        headers: what else it says of the file.
    """

    content: bytes
    tag: str = '"1"'
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    length: bool = True
    headers: dict[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    """Files by their path, faults that are played once each, and the requests that came."""

    daemon_threads = True

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, File] = {}
        self.redirects: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        """`http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request; GET alone."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append({"path": self.path, **dict(self.headers.items())})
        if self.server.faults:
            return self.server.faults.pop(0)(self)
        if target := self.server.redirects.get(self.path):
            return answer(self, 302, headers={"Location": target})
        file = self.server.files.get(self.path)
        if file is None:
            return answer(self, 404)
        send(self, file)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests print enough."""


def answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def failing(status: int, **headers: str) -> Fault:
    """A fault: an answer with this status."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: answer(handler, status, b"no", named)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """A fault: the connection ends without an answer."""
    handler.close_connection = True


def send(handler: BaseHTTPRequestHandler, file: File) -> None:
    """A file or the part of it that is asked for, up to its next break."""
    content, start = file.content, 0
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    condition = handler.headers.get("If-Range")
    if asked and file.ranges and condition in (None, file.tag):
        start = int(asked[1])
        if start >= len(content):
            return answer(handler, 416)
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        handler.send_response(200)
    if file.ranges:
        handler.send_header("Accept-Ranges", "bytes")
    if file.tag:
        handler.send_header("ETag", file.tag)
    if file.length:
        handler.send_header("Content-Length", str(len(content) - start))
    for name, value in file.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    end = len(content)
    if file.breaks:
        end = min(end, start + file.breaks.pop(0))
    handler.wfile.write(content[start:end])
    if end < len(content) or not file.length:
        handler.close_connection = True


@contextlib.contextmanager
def serving(handler: type[Handler] = Handler) -> Iterator[Server]:
    """A server that runs while the block does."""
    with Server(handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
