"""A loopback server that behaves like OpenAI's: Responses, Chat Completions, Files and Batches.

Without pytest, so that a benchmark can run it in a process of its own.
"""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import json
import socket
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-planted-0123456789abcdef"
ANSWER = {"subjects": ["tom"], "action": "run", "place": "garden", "caption": "Tom is running."}
PRICE = (2.5, 10.0)  # dollars per million tokens, gpt-4o's
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed in time."}

Fault = Callable[[BaseHTTPRequestHandler], bool]


class Server(ThreadingHTTPServer):
    """Answers as it is told to; `faults` are played once each, first come first served.

    Attributes:
        requests: what was asked of a model: `path`, `headers` and the body's fields.
        fault_of: the fault for a request, once `faults` are used up.
        served: the pictures of requests that were answered without a fault.
        lacks: of "responses", "json_schema", "json_object", "usage": what it does not know.
        limit: requests in any `window` seconds, enforced and told in the headers; 0 for none.
        violations: requests above that limit.
        spent: dollars, by its own count.
        calls: method and path of everything that has to do with files and batches.
        admin_faults: by such a method and path, as `faults`.
        polls: how often a batch is asked after before it ends.
        ends: how batches end, in order of their creation: a status of the API's, or "crowded" for
            a queue that is full; then "completed".
        line_faults: what happens to lines of batches, first come first served: "well", "500",
            "400", "missing", "refusal" or "nonsense".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.requests: list[dict[str, Any]] = []
        self.served: list[str] = []
        self.faults: list[Fault] = []
        self.fault_of: Callable[[dict[str, Any]], Fault | None] = lambda body: None
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: ANSWER
        self.latency = 0.0
        self.tokens = (400, 40)
        self.together = self.most_together = 0
        self.lacks: set[str] = set()
        self.limit, self.window = 0, 60.0
        self.arrivals: deque[float] = deque()
        self.violations = self.most_in_window = 0
        self.spent = 0.0
        self.calls: list[str] = []
        self.admin_faults: dict[str, list[Fault]] = {}
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.polls = 1
        self.ends: list[str] = []
        self.line_faults: list[str] = []
        self.lock = threading.RLock()
        self.connections = 0
        self.closed = threading.Condition(self.lock)

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no news."""

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.closed:
                self.connections -= 1
                self.closed.notify_all()

    def settle(self) -> None:
        """Wait until all that clients sent which are gone by now has been dealt with."""
        # Connections are taken up in their order: an answer means that no older one is waiting.
        with socket.create_connection(self.server_address[:2]) as last:
            last.sendall(b"GET /v1/settle HTTP/1.1\r\nConnection: close\r\n\r\n")
            while last.recv(4096):
                pass
        with self.closed:
            assert self.closed.wait_for(lambda: not self.connections, timeout=300)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> Counter[str]:
        """How often each picture was asked about, by direct requests."""
        with self.lock:
            return Counter(picture_of(request) for request in self.requests)

    def bill(self, share: float = 1.0) -> None:
        with self.lock:
            self.spent += share * sum(n * p for n, p in zip(self.tokens, PRICE, strict=True)) / 1e6

    # -- limits

    def admit(self) -> dict[str, str] | None:
        """Rate-limit headers for a request that has come, or None where it is one too many."""
        if not self.limit:
            return {}
        with self.lock:
            now = time.monotonic()
            while self.arrivals and self.arrivals[0] <= now - self.window:
                self.arrivals.popleft()
            inside = len(self.arrivals) + 1
            self.most_in_window = max(self.most_in_window, inside)
            if inside > self.limit:
                self.violations += 1
                return None
            self.arrivals.append(now)
            return self.limits()

    def limits(self) -> dict[str, str]:
        return {
            "x_ratelimit_limit_requests": str(self.limit),
            "x_ratelimit_remaining_requests": str(self.limit - len(self.arrivals)),
            "x_ratelimit_reset_requests": f"{self.window * 1000:.0f}ms",
        }

    # -- batches

    def create_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            made = {
                "id": f"batch_{len(self.batches)}",
                "object": "batch",
                "endpoint": body["endpoint"],
                "input_file_id": body["input_file_id"],
                "completion_window": body["completion_window"],
                "created_at": int(time.time()),
                "status": "validating",
                "metadata": body.get("metadata"),
                "output_file_id": None,
                "error_file_id": None,
                "errors": None,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "_end": self.ends.pop(0) if self.ends else "completed",
                "_polls": 0,
            }
            self.batches[made["id"]] = made
            return made

    def poll(self, batch: dict[str, Any]) -> None:
        """A batch is asked after: it goes on, and at the end has its files."""
        with self.lock:
            batch["_polls"] += 1
            if batch["status"] not in ("validating", "in_progress"):
                return
            batch["status"] = "in_progress"
            if batch["_polls"] > self.polls:
                self._end(batch)

    def _end(self, batch: dict[str, Any]) -> None:
        end = batch["status"] = batch["_end"]
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        if end in ("failed", "crowded"):
            batch["status"] = "failed"
            trouble = {"code": "invalid", "message": "line is no JSON", "line": 3, "param": None}
            if end == "crowded":
                trouble = {"code": "token_limit_exceeded", "message": "queue is full"}
            batch["errors"] = {"object": "list", "data": [trouble]}
            return
        done, failed = [], []
        for number, line in enumerate(lines):
            record = {"id": f"batch_req_{number}", "custom_id": line["custom_id"]}
            if end in ("expired", "cancelled") and number >= len(lines) // 2:
                if end == "expired":
                    failed.append({**record, "response": None, "error": EXPIRED})
                continue
            fault = self.line_faults.pop(0) if self.line_faults else "well"
            if fault == "missing":
                continue
            if fault in ("500", "400"):
                trouble = {"message": "odd picture", "type": "server", "code": "invalid_image"}
                body: Any = {"error": trouble}
                response = {"status_code": int(fault), "request_id": f"r{number}", "body": body}
                failed.append({**record, "response": response, "error": None})
                continue
            answer = {"refusal": {"refusal": "I cannot"}, "nonsense": "no JSON"}.get(
                fault, self.answer(line["body"])
            )
            body = response_body(answer, self.tokens, line["body"])
            self.bill(0.5)
            self.served.append(picture_of(line["body"]))
            response = {"status_code": 200, "request_id": f"breq_{number}", "body": body}
            done.append({**record, "response": response, "error": None})
        # The order of a real output file is not that of the requests.
        for kind, records in (("output", done[::-1]), ("error", failed)):
            if records:
                name = f"file-{kind}-{batch['id']}"
                self.files[name] = b"".join(json.dumps(r).encode() + b"\n" for r in records)
                batch[f"{kind}_file_id"] = name
        counts = {"total": len(lines), "completed": len(done), "failed": len(failed)}
        batch["request_counts"] = counts


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Small answers must not wait for a full packet.
    disable_nagle_algorithm = True
    server: Server
    body: Any
    limits: dict[str, str]
    counted = False

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if not self.path.endswith(("/responses", "/chat/completions")):
            self.body = content
            self.administer()
            return
        body = self.body = json.loads(content)
        with self.server.lock:
            self.server.requests.append({"path": self.path, "headers": self.headers, **body})
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        self.counted = True
        try:
            if self.refused(body):
                return
            with self.server.lock:
                faults = self.server.faults
                fault = faults.pop(0) if faults else self.server.fault_of(body)
            if fault is None or not fault(self):
                time.sleep(self.server.latency)
                self.respond(self.server.answer(body))
                with self.server.lock:
                    self.server.served.append(picture_of(body))
        finally:
            self.leave()

    def leave(self) -> None:
        """No longer under way: told before the answer is sent, which may bring the next request."""
        with self.server.lock:
            self.server.together -= self.counted
            self.counted = False

    def do_GET(self) -> None:
        self.administer()

    def refused(self, body: dict[str, Any]) -> bool:
        """Answer, and True, where the server lacks what is asked for or is asked too often."""
        self.limits = {}
        limits = self.server.admit()
        if limits is None:
            self.limits = self.server.limits()
            error(429, "rate limit reached", code="rate_limit_exceeded")(self)
            return True
        self.limits = limits
        kind = format_of(body)
        if "responses" in self.server.lacks and self.path.endswith("/responses"):
            self.send(404, {"detail": "Not Found"})
            return True
        if kind in self.server.lacks:
            name = "text.format" if "input" in body else "response_format"
            error(400, f"{name} of type {kind} is not supported")(self)
            return True
        return False

    def respond(self, answer: Any, **changes: Any) -> None:
        self.server.bill()
        body = response_body(answer, self.server.tokens, self.body)
        if "usage" in self.server.lacks:
            del body["usage"]
        self.send(200, {**body, **changes})

    def send(self, status: int, body: Any, **headers: str) -> None:
        self.leave()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("x-request-id", f"req_{len(self.server.requests)}")
        for name, value in {**getattr(self, "limits", {}), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass

    # -- files and batches

    def administer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = url.path.removeprefix("/v1")
        kind = f"{self.command} /{path.split('/')[1]}"
        with self.server.lock:
            self.server.calls.append(f"{self.command} {path}")
            faults = self.server.admin_faults.get(kind, [])
            fault = faults.pop(0) if faults else None
        if fault is not None and fault(self):
            return
        parts = path.strip("/").split("/")
        if kind == "POST /files":
            with self.server.lock:
                name = f"file-{len(self.server.files)}"
                self.server.files[name] = self.uploaded()
            size = len(self.server.files[name])
            made = {"id": name, "object": "file", "bytes": size, "created_at": 1}
            self.send(200, {**made, "filename": "b.jsonl", "purpose": "batch", "status": "ready"})
        elif kind == "GET /files" and parts[-1] == "content":
            self.send(200, self.server.files[parts[1]])
        elif kind == "POST /batches":
            self.send(200, plain(self.server.create_batch(json.loads(self.body))))
        elif kind == "GET /batches" and len(parts) == 2:
            batch = self.server.batches[parts[1]]
            self.server.poll(batch)
            self.send(200, plain(batch))
        elif kind == "GET /batches":
            after = urllib.parse.parse_qs(url.query).get("after", [""])[0]
            newest = list(self.server.batches.values())[::-1]
            ids = [batch["id"] for batch in newest]
            first = ids.index(after) + 1 if after else 0
            page = newest[first : first + 2]  # short pages, so that turning them is tested
            more = first + 2 < len(newest)
            self.send(200, {"object": "list", "data": [plain(b) for b in page], "has_more": more})
        else:
            self.send(404, {"error": {"message": "no such path", "type": "error", "code": None}})

    def uploaded(self) -> bytes:
        """The file in a multipart form."""
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + self.body)
        for part in form.iter_parts():
            if part.get_param("name", header="content-disposition") == "file":
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                return content
        raise AssertionError("no file in the form")


# ---- what it says --------------------------------------------------------------------------------


def picture_of(body: dict[str, Any]) -> str:
    """The data URL of the picture that a request is about."""
    if "input" in body:
        return body["input"][0]["content"][0]["image_url"]
    parts = body["messages"][-1]["content"]
    return next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")


def format_of(body: dict[str, Any]) -> str:
    """ "json_schema", "json_object" or "text": the form that a request asks for."""
    form = body.get("text", {}).get("format") if "input" in body else body.get("response_format")
    return form["type"] if form else "text"


def response_body(answer: Any, tokens: tuple[int, int], request: dict[str, Any]) -> dict[str, Any]:
    """A whole answer in the form of the API that was asked: a dict, a string, or a refusal."""
    given, taken = tokens
    refusal = answer["refusal"] if isinstance(answer, dict) and "refusal" in answer else None
    text = answer if isinstance(answer, str) else json.dumps(answer)
    if isinstance(answer, dict) and format_of(request) == "text" and refusal is None:
        text = "\n".join(
            f"{name}: {', '.join(value) if isinstance(value, list) else value}"
            for name, value in answer.items()
        )
    if "input" not in request:
        message = {"role": "assistant", "content": None if refusal else text, "refusal": refusal}
        return {
            "id": "chatcmpl_1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": given,
                "completion_tokens": taken,
                "total_tokens": given + taken,
            },
        }
    content = {"type": "output_text", "text": text, "annotations": []}
    if refusal is not None:
        content = {"type": "refusal", "refusal": refusal}
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": request["model"],
        "status": "completed",
        "output": [{**message, "content": [content]}],
        "usage": {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": taken,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": given + taken,
        },
    }


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("_")}


# ---- faults --------------------------------------------------------------------------------------


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Fault:
    def fault(handler: BaseHTTPRequestHandler) -> bool:
        assert isinstance(handler, Handler)
        body = {"error": {"message": message, "type": "error", "code": code, "param": None}}
        handler.send(status, body, **headers)
        return True

    return fault


def answering(answer: Any, **changes: Any) -> Fault:
    def fault(handler: BaseHTTPRequestHandler) -> bool:
        assert isinstance(handler, Handler)
        handler.respond(answer, **changes)
        return True

    return fault


def silent(handler: BaseHTTPRequestHandler) -> bool:
    """A server that answers too late: when its client has given up, or was killed."""
    with contextlib.suppress(ConnectionError):
        handler.connection.recv(1)
    return False


def hang_up(handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    handler.connection.shutdown(2)
    return True


def bill_and_hang_up(handler: BaseHTTPRequestHandler) -> bool:
    """The work is done and charged for, its answer lost on the way."""
    assert isinstance(handler, Handler)
    handler.server.bill()
    return hang_up(handler)


def create_and_hang_up(handler: BaseHTTPRequestHandler) -> bool:
    """A batch is created, the reply lost on the way."""
    assert isinstance(handler, Handler)
    handler.server.create_batch(json.loads(handler.body))
    return hang_up(handler)


def no_json(handler: BaseHTTPRequestHandler) -> bool:
    assert isinstance(handler, Handler)
    handler.send(200, b"<html>bad gateway</html>")
    return True


def well(handler: BaseHTTPRequestHandler) -> bool:
    return False


# ---- for tests -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread of this process."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


def pictures(folder: Path, count: int, *, size: int = 24) -> Path:
    """A new folder with so many different pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        array = rng.integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    return folder
