"""Stage 02: replay, species, statistics, and the OpenAI source over real HTTP on a loopback."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, captioner, captions, collect, scenes, spending
from tomjerry_utils.profiles import load_profile

KEY = "sk-planted-0123456789abcdef"
ANSWER = {"subjects": ["tom"], "action": "run", "place": "garden", "caption": "Tom is running."}
FIELDS = [
    *("file_name", "sha256", "caption", "subjects", "action", "place", "model"),
    *("prompt_version", "input_tokens", "output_tokens", "usd", "request_id", "status"),
]

Fault = Callable[[BaseHTTPRequestHandler], bool]


class Server(ThreadingHTTPServer):
    """Behaves like the Responses API; `faults` are played once each, first come first served."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.served: list[str] = []
        self.faults: list[Fault] = []
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: ANSWER
        self.latency = 0.0
        self.tokens = (400, 40)
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "headers": self.headers, **body})
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            if fault is None or not fault(self):
                time.sleep(self.server.latency)
                self.respond(self.server.answer(body))
                with self.server.lock:
                    self.server.served.append(body["input"][0]["content"][0]["image_url"])
        finally:
            with self.server.lock:
                self.server.together -= 1

    def respond(self, answer: Any, **changes: Any) -> None:
        content = {"type": "output_text", "text": json.dumps(answer), "annotations": []}
        if isinstance(answer, str):
            content["text"] = answer
        if isinstance(answer, dict) and "refusal" in answer:
            content = {"type": "refusal", "refusal": answer["refusal"]}
        given, taken = self.server.tokens
        self.send(
            200,
            {
                "id": "resp_1",
                "object": "response",
                "created_at": 1,
                "model": "gpt-4o",
                "status": "completed",
                "output": [
                    {
                        "type": "message",
                        "id": "msg_1",
                        "role": "assistant",
                        "status": "completed",
                        "content": [content],
                    }
                ],
                "usage": {
                    "input_tokens": given,
                    "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens": taken,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": given + taken,
                },
                **changes,
            },
        )

    def send(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("x-request-id", f"req_{len(self.server.requests)}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


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


def hang_up(handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    handler.connection.shutdown(2)
    return True


def no_json(handler: BaseHTTPRequestHandler) -> bool:
    assert isinstance(handler, Handler)
    handler.send(200, b"<html>bad gateway</html>")
    return True


def well(handler: BaseHTTPRequestHandler) -> bool:
    return False


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def own_runs(session_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run root for one test, with the pictures that the session has collected."""
    made = collect.ensure(load_profile("smoke"))
    shutil.copytree(made.folder, tmp_path / "runs" / "smoke" / made.folder.name)
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No real waiting between attempts."""
    monkeypatch.setattr(captioner._Run, "_back_off", lambda self, failures, pause: None)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        array = rng.integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    return folder


def run(server: Server, images: Path, out: Path, **changes: Any) -> captions.Captions:
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 4, **changes}
    return captions.caption_folder(images, out, base_url=server.url, **arguments)


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mapped"),
    [
        (
            "tom is running in the kitchen, facing left",
            "a cat is running in the kitchen, facing left",
        ),
        ("tom and jerry are sitting", "a cat and a mouse are sitting"),
        ("Jerry hides. Tom waits for jerry", "A mouse hides. A cat waits for the mouse"),
        ("a cat and a mouse are sitting", "a cat and a mouse are sitting"),
        ("a tomato and a tomcat", "a tomato and a tomcat"),
        ("the plate that Tom broke", "the plate that a cat broke"),
        ("", ""),
    ],
)
def test_species_are_mapped(given: str, mapped: str) -> None:
    assert captions.to_target(given) == mapped
    assert captions.to_target(mapped) == mapped


def test_mapped_captions_of_scenes_are_the_natural_ones() -> None:
    for seed in range(9_300_000, 9_300_040):
        scene = scenes.describe(seed)
        text = scenes.caption(scene, "cartoon")
        assert captions.to_target(text) == scenes.caption(scene, "natural")
        wanted = {"tom": ["tom -> cat"], "jerry": ["jerry -> mouse"]}
        both = ["tom -> cat", "jerry -> mouse"]
        assert captions.mapped_species(text) == wanted.get(scene.cls, both)


def test_statistics_by_hand() -> None:
    rows = [
        {"caption": "tom is running", "action": "run", "place": "garden", "subjects": ["tom"]},
        {"caption": "tom is running", "action": "run", "place": "street", "subjects": ["tom"]},
        {"caption": "a cat sits, alone", "action": "sit", "place": "street", "subjects": ["cat"]},
        {"caption": "jerry", "action": "sit", "place": "garden", "subjects": ["jerry"]},
    ]
    found = captions.statistics(rows)
    assert found["captions"] == 4
    assert found["distinct"] == 3
    assert found["words"] == {"mean": 2.75, "least": 1, "most": 4, "histogram": {1: 1, 3: 2, 4: 1}}
    assert found["vocabulary"] == 8
    assert found["balance"] == pytest.approx(1.0)
    assert captions.statistics(rows[:2])["balance"] == 0.0
    assert captions.statistics(rows[:3])["balance"] == pytest.approx(0.9183, abs=1e-4)
    assert captions.statistics([])["captions"] == 0


def test_sample_depends_on_seed_alone() -> None:
    rows = [{"file_name": f"{i:03d}"} for i in range(200)]
    first = captions.sample(rows, 20, seed=1)
    assert len({row["file_name"] for row in first}) == 20
    assert captions.sample(rows[::-1], 20, seed=1) == first
    assert captions.sample(rows, 20, seed=2) != first
    assert captions.sample(rows, 500, seed=1) == rows


# ---- the stage -----------------------------------------------------------------------------------


def test_stage_replays_scene_captions(own_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    profile = load_profile("smoke")
    made = captions.ensure(profile)
    images = collect.ensure(profile)
    train = {row["file_name"]: row for row in images.select(split="train")}
    assert len(made.rows) == profile.captions.count
    for row in made.rows:
        known = train[row["file_name"]]
        assert list(row)[:13] == FIELDS
        assert row["caption"] == known["text"]
        assert (row["model"], row["usd"], row["status"]) == ("scene grammar", 0.0, "ok")
        assert row["sha256"] == known["sha256"]
        assert bool(row["mapped"]) == (known["domain"] == "cartoon")
        assert "tom" not in row["target"].split()
    assert {train[row["file_name"]]["domain"] for row in made.rows} == set(scenes.STYLES)
    assert not made.set_aside
    noted = json.loads((made.folder / "sample.json").read_text())
    assert noted["seed"] == profile.seed
    assert noted["file_names"] == [row["file_name"] for row in made.rows]
    monkeypatch.setattr(captions, "write_captions", lambda *a: pytest.fail("made again"))
    assert captions.ensure(profile).rows == made.rows
    other = load_profile("smoke", seed=profile.seed + 1)
    pool = images.select(split="train")
    count = profile.captions.count
    assert captions.sample(pool, count, seed=other.seed) != [train[n] for n in noted["file_names"]]


def test_paid_stage_wants_a_budget_first(
    own_runs: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.delenv("TOMJERRY_CAPTION_BUDGET", raising=False)
    profile = load_profile("smoke")
    settings = {"source": "openai", "model": "gpt-4o", "count": 4}
    paid = profile.model_copy(update={"captions": profile.captions.model_copy(update=settings)})
    with pytest.raises(UserError, match="TOMJERRY_CAPTION_BUDGET"):
        captions.ensure(paid)
    assert server.requests == []
    monkeypatch.setenv("TOMJERRY_CAPTION_BUDGET", "1")
    made = captions.ensure(paid)
    assert len(made.rows) == len(server.requests) == 4
    assert made.usd == pytest.approx(4 * (400 * 2.5 + 40 * 10) / 1e6)
    # Another sample of the same pictures: what was asked before is not asked again.
    more = paid.model_copy(update={"seed": 5})
    again = captions.ensure(more)
    asked = {row["file_name"] for row in made.rows} | {row["file_name"] for row in again.rows}
    assert len(server.requests) == len(asked)


# ---- requests ------------------------------------------------------------------------------------


def test_folder_is_captioned_and_resumed(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 9)
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    (images / "torn.png").write_bytes(b"\x89PNG torn")
    made = run(server, images, tmp_path / "out")
    assert [row["file_name"] for row in made.rows] == [
        *(f"{i:02d}.png" for i in range(9)),
        "copy.png",
    ]
    assert len(server.requests) == 9
    row = made.rows[0]
    assert list(row)[:13] == FIELDS
    assert row["caption"] == "Tom is running."
    assert row["target"] == "A cat is running."
    assert row["mapped"] == ["tom -> cat"]
    assert (row["input_tokens"], row["output_tokens"]) == server.tokens
    assert row["usd"] == pytest.approx((400 * 2.5 + 40 * 10) / 1e6)
    assert row["request_id"].startswith("req_")
    assert made.set_aside[0]["file_name"] == "torn.png"
    assert "torn.png" in made.set_aside[0]["reason"]
    pictures(tmp_path / "more", 1)
    again = run(server, images, tmp_path / "out")
    assert again.rows == made.rows
    assert len(server.requests) == 9


def test_request_is_what_the_api_takes(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 1)
    large = np.tile(np.linspace(0, 255, 900, dtype=np.uint8)[None, :, None], (300, 1, 3))
    Image.fromarray(large).save(images / "large.png")
    run(server, images, tmp_path / "out", concurrency=1, detail="low")
    small, big = server.requests
    assert small["path"] == "/v1/responses"
    assert small["headers"]["authorization"] == f"Bearer {KEY}"
    form = small["text"]["format"]
    assert form["strict"] is True
    assert set(form["schema"]["required"]) == set(form["schema"]["properties"]) == set(ANSWER)
    assert form["schema"]["additionalProperties"] is False
    part = big["input"][0]["content"][0]
    assert (part["type"], part["detail"]) == ("input_image", "low")
    kind, _, data = part["image_url"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 171)
    assert small["input"][0]["content"][0]["image_url"].startswith("data:image/png;base64,")


def test_faults_are_survived_and_nothing_asked_twice(
    server: Server, tmp_path: Path, quick: None
) -> None:
    images = pictures(tmp_path / "in", 12)
    server.faults = [
        well,
        error(429, retry_after="0"),
        error(500),
        hang_up,
        error(503),
        no_json,
        answering("not json"),
        answering({**ANSWER, "caption": ""}),
        answering({"caption": "no other field"}),
        answering(ANSWER, status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
        answering({"refusal": "I cannot"}),
        error(429),
    ]
    made = run(server, images, tmp_path / "out")
    assert len(made.rows) == 12
    assert not made.set_aside
    # Every picture was answered well exactly once; the rest were the faults.
    assert set(Counter(server.served).values()) == {1}
    assert len(server.requests) == 12 + 11
    # Bad answers were paid for; cut ones may have been, and are booked at their worst.
    store = [json.loads(line) for line in (tmp_path / "out/store.jsonl").read_text().splitlines()]
    booked = sum(line["usd"] for line in store if line["event"] != "sent")
    sure = (12 + 5) * (400 * 2.5 + 40 * 10) / 1e6
    assert sure < booked < 1.0
    cut = [line for line in store if line["event"] == "failed" and line["usd"] > 0]
    assert len(cut) == 2
    assert made.usd == pytest.approx(booked)


def test_hopeless_pictures_are_set_aside_with_the_reason(
    server: Server, tmp_path: Path, quick: None
) -> None:
    images = pictures(tmp_path / "in", 6)
    bad, _ = captioner._encode(images / "03.png")

    def answer(body: dict[str, Any]) -> Any:
        url = body["input"][0]["content"][0]["image_url"]
        return {"refusal": "not this one"} if url == bad else ANSWER

    server.answer = answer
    server.faults = [well, error(400, "picture too odd", code="invalid_image")]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert [(row["file_name"], row["status"]) for row in made.set_aside] == [
        ("01.png", "refused"),
        ("03.png", "refused"),
    ]
    assert "picture too odd" in made.set_aside[0]["reason"]
    assert "not this one" in made.set_aside[1]["reason"]
    count = len(server.requests)
    run(server, images, tmp_path / "out")
    assert len(server.requests) == count


def test_server_that_fails_for_long_sets_aside_until_the_next_run(
    server: Server, tmp_path: Path, quick: None
) -> None:
    images = pictures(tmp_path / "in", 3)
    server.faults = [well, *[error(500)] * captioner.ATTEMPTS]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert [(row["file_name"], row["status"]) for row in made.set_aside] == [("01.png", "failed")]
    assert len(run(server, images, tmp_path / "out").rows) == 3


@pytest.mark.parametrize("concurrency", [1, 8])
def test_budget_holds_with_requests_under_way(
    server: Server, tmp_path: Path, concurrency: int
) -> None:
    images = pictures(tmp_path / "in", 30)
    server.latency = 0.01
    each = (400 * 2.5 + 40 * 10) / 1e6
    budget = 12 * each
    with pytest.raises(UserError, match="larger --budget"):
        run(server, images, tmp_path / "out", budget=budget, concurrency=concurrency)
    spent = len(server.requests) * each
    assert 0.5 * budget < spent <= budget
    written = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    assert len(written) == len(server.requests)
    made = run(server, images, tmp_path / "out", budget=1.0)
    assert len(made.rows) == len(server.requests) == 30


def test_answers_dearer_than_expected_do_not_break_the_budget(
    server: Server, tmp_path: Path
) -> None:
    images = pictures(tmp_path / "in", 30)
    server.tokens = (20_000, 200)
    each = (20_000 * 2.5 + 200 * 10) / 1e6
    with pytest.raises(UserError, match="budget"):
        run(server, images, tmp_path / "out", budget=5.5 * each, concurrency=8)
    assert len(server.requests) == 5


def test_requests_run_together_but_not_beyond_the_limit(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 24)
    server.latency = 0.05
    run(server, images, tmp_path / "out", concurrency=6)
    assert 3 <= server.most_together <= 6


def test_retry_after_is_honoured_by_all(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 6)
    times: list[float] = []
    server.answer = lambda body: times.append(time.monotonic()) or ANSWER
    server.faults = [well, error(429, retry_after="0.5")]
    begun = time.monotonic()
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert len(made.rows) == 6
    assert times[1] - times[0] >= 0.5
    assert time.monotonic() - begun < 5
    assert captioner._retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert captioner._retry_after({"retry-after-ms": "1500"}) == 1.5
    assert captioner._retry_after({"retry-after": "soon"}) is None
    assert captioner._retry_after({}) is None


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (error(401, f"wrong key {KEY}"), r"HTTP 401.*\*\*\*"),
        (error(404, "no such model"), "HTTP 404.*no such model"),
        (error(429, "pay first", code="insufficient_quota"), "pay first"),
        (error(400, "unknown parameter"), "unknown parameter"),
    ],
)
def test_what_cannot_get_better_stops_at_once(
    server: Server, tmp_path: Path, fault: Fault, told: str
) -> None:
    images = pictures(tmp_path / "in", 8)
    server.faults = [fault] * 8
    with pytest.raises(UserError, match=told) as caught:
        run(server, images, tmp_path / "out")
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_no_server_is_one_line(tmp_path: Path, server: Server, quick: None) -> None:
    images = pictures(tmp_path / "in", 3)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1"):
        captions.caption_folder(
            images, tmp_path / "out", base_url="http://127.0.0.1:9/v1", model="gpt-4o", budget=1.0
        )
    store = (tmp_path / "out" / "store.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["usd"] for line in store if '"failed"' in line) == 0.0


def test_mistakes_are_told_before_anything_is_sent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(tmp_path / "in", 1)
    for changes, told in (
        ({"budget": 0.0}, "above 0"),
        ({"concurrency": 0}, "above 0"),
        ({"prompt_version": "v0"}, "no prompt"),
        ({"price": (-1.0, 1.0)}, "price"),
    ):
        with pytest.raises(UserError, match=told):
            run(server, images, tmp_path / "out", **changes)
    with pytest.raises(UserError, match="folder"):
        run(server, tmp_path / "none", tmp_path / "out")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        captions.caption_folder(
            images, tmp_path / "out", base_url=captions.OPENAI, model="gpt-4o", budget=1.0
        )
    assert server.requests == []
    # One's own server needs no key.
    assert len(run(server, images, tmp_path / "out").rows) == 1


def test_key_reaches_no_file_and_no_output(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], quick: None
) -> None:
    images = pictures(tmp_path / "in", 4)
    server.faults = [
        well,
        error(500, f"trouble with {KEY}"),
        answering({"refusal": f"no, {KEY}"}),
        answering({"refusal": f"no, {KEY}"}),
        answering({"refusal": f"no, {KEY}"}),
        answering({"refusal": f"no, {KEY}"}),
    ]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert "***" in json.dumps(made.set_aside)
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err
    for path in (tmp_path / "out").rglob("*"):
        assert KEY.encode() not in path.read_bytes()


def test_kill_loses_no_answer(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 40)
    server.latency = 0.03
    out = tmp_path / "out"
    arguments = {"base_url": server.url, "model": "gpt-4o", "budget": 1.0, "concurrency": 4}
    call = (
        "from pathlib import Path; from tomjerry_utils import captions; "
        f"captions.caption_folder(Path({str(images)!r}), Path({str(out)!r}), **{arguments!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(server.served) < 10:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stored = (out / "store.jsonl").read_bytes().count(b'"answer"')
    with (out / "store.jsonl").open("ab") as file:
        file.write(b'{"event": "answer", "id": "torn')
    time.sleep(0.1)
    before = len(server.requests)
    made = run(server, images, out)
    assert len(made.rows) == 40
    assert len(server.requests) - before == 40 - stored
    # At most the requests under way at the kill were sent a second time.
    assert len(server.requests) - 40 <= 4
    store = spending.Store(out / "store.jsonl")
    assert len(server.requests) - 40 <= len(store.possibly_paid) <= 4
    assert store.booked >= made.usd
    store.close()


def test_two_processes_do_not_share_a_store(server: Server, tmp_path: Path) -> None:
    from filelock import FileLock

    images = pictures(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another process"),
    ):
        run(server, images, tmp_path / "out")
    assert server.requests == []


# ---- prices --------------------------------------------------------------------------------------


def test_pictures_are_counted_both_ways() -> None:
    tiles, patches = spending.PRICES["gpt-4o"], spending.PRICES["gpt-4.1-mini"]
    assert spending.image_tokens(512, 512, tiles) == 255
    assert spending.image_tokens(1024, 1024, tiles) == 765
    assert spending.image_tokens(2048, 4096, tiles) == 1105
    assert spending.image_tokens(4096, 4096, tiles, "low") == 85
    assert spending.image_tokens(1024, 1024, patches) == -(-1024 * 162 // 100)
    assert spending.image_tokens(4000, 4000, patches) == -(-1536 * 162 // 100)


def test_unknown_models_ask_for_a_price(capfd: pytest.CaptureFixture[str]) -> None:
    table = spending.PRICES
    assert spending.price_of("gpt-4o-2024-08-06", captions.OPENAI) == table["gpt-4o"]
    with pytest.raises(UserError, match="--price"):
        spending.price_of("llava", "https://example.com/v1")
    given = spending.price_of("llava", "https://example.com/v1", (1.0, 2.0))
    assert given.usd(10**6, 10**6) == 3.0
    assert spending.price_of("llava", "http://localhost:8000/v1").input == table["gpt-4o"].input
    assert "--price" in capfd.readouterr().err
    assert spending.price_of("llava", "http://localhost:8000/v1", (0.0, 0.0)).usd(999, 999) == 0
