"""Stage 02: replay, species, statistics, and the OpenAI source over real HTTP on a loopback."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caption_server import (
    ANSWER,
    KEY,
    Fault,
    Server,
    answering,
    bill_and_hang_up,
    error,
    hang_up,
    no_json,
    picture_of,
    pictures,
    silent,
    well,
)
from PIL import Image

from tomjerry_utils import (
    UserError,
    caption_answers,
    caption_requests,
    caption_store,
    captioner,
    captions,
    collect,
    pacing,
    scenes,
    spending,
)
from tomjerry_utils.profiles import load_profile

FIELDS = [
    *("file_name", "sha256", "caption", "subjects", "action", "place", "model"),
    *("prompt_version", "input_tokens", "output_tokens", "usd", "request_id", "status"),
]

EACH = (400 * 2.5 + 40 * 10) / 1e6  # dollars that an answer costs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No real waiting between attempts."""
    monkeypatch.setattr(caption_requests.Run, "_back_off", lambda self, failures, pause: None)


def run(server: Server, images: Path, out: Path, **changes: Any) -> captions.Captions:
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 4, **changes}
    return captions.caption_folder(images, out, base_url=server.url, **arguments)


def source(server: Server, store: Path, **changes: Any) -> captioner.OpenAISource:
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 4, **changes}
    return captioner.OpenAISource(store, base_url=server.url, **arguments)


def rows_of(images: Path) -> list[dict[str, Any]]:
    return [{"file_name": path.name} for path in sorted(images.iterdir())]


def process(server: Server, store: Path, images: Path, **changes: Any) -> subprocess.Popen[str]:
    """The source in a process of its own, which prints each caption's file name and status."""
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 4, **changes}
    call = (
        "from pathlib import Path; from tomjerry_utils.captioner import OpenAISource\n"
        f"rows = {rows_of(images)!r}\n"
        f"source = OpenAISource(Path({str(store)!r}), base_url={server.url!r}, **{arguments!r})\n"
        f"for row in source(rows, Path({str(images)!r})):\n"
        "    print(row.file_name, row.status, flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines_of(store: Path) -> list[dict[str, Any]]:
    """A store's whole lines; a kill may have torn some."""
    found = []
    for line in store.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def senders(store: Path) -> set[str]:
    """The runs that sent a request."""
    return {line["run"] for line in lines_of(store) if line["event"] == "sent"}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[caption_store.Store]:
    with contextlib.closing(caption_store.Store(path)) as store:
        yield store


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
    bad, _ = captioner.encode(images / "03.png", 512)

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
    server.faults = [well, *[error(500)] * caption_requests.ATTEMPTS]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert [(row["file_name"], row["status"]) for row in made.set_aside] == [("01.png", "failed")]
    assert len(run(server, images, tmp_path / "out").rows) == 3


@pytest.mark.parametrize("concurrency", [1, 8])
def test_budget_holds_with_requests_under_way(
    server: Server, tmp_path: Path, concurrency: int
) -> None:
    images = pictures(tmp_path / "in", 30)
    server.latency = 0.01
    each = EACH
    budget = 12 * each
    with pytest.raises(UserError, match="larger --budget"):
        run(server, images, tmp_path / "out", budget=budget, concurrency=concurrency)
    spent = len(server.requests) * each
    # Requests under way hold back more than they turn out to cost.
    assert 0.25 * budget < spent <= budget
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
    six = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        # The first goes alone; then nobody is answered before six are asking.
        if server.together == 6:
            six.set()
        if len(server.requests) > 1:
            six.wait(300)
        return ANSWER

    server.answer = answer
    run(server, images, tmp_path / "out", concurrency=6, timeout=600)
    assert server.most_together == 6


def test_retry_after_is_honoured_by_all(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(tmp_path / "in", 6)
    times: list[float] = []
    held: list[float] = []
    hold = pacing.Pacer.hold
    monkeypatch.setattr(
        pacing.Pacer, "hold", lambda self, seconds: held.append(seconds) or hold(self, seconds)
    )
    server.answer = lambda body: times.append(time.monotonic()) or ANSWER
    server.faults = [well, error(429, retry_after="0.5")]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert len(made.rows) == 6
    assert times[1] - times[0] >= 0.5
    assert held == [0.5]
    assert pacing.retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert pacing.retry_after({"retry-after-ms": "1500"}) == 1.5
    assert pacing.retry_after({"retry-after": "soon"}) is None
    assert pacing.retry_after({}) is None


def test_waiting_when_told_to_is_no_failure(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 3)
    refusals = 2 * caption_requests.ATTEMPTS
    server.faults = [well, *[error(429, retry_after_ms="1")] * refusals]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert len(made.rows) == 3
    assert len(server.requests) == 3 + refusals
    # A server that is away for hours is not waited for.
    server.faults = [error(429, retry_after="7200")]
    with pytest.raises(UserError, match="120 minutes"):
        run(server, images, tmp_path / "again")


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
        answering({**ANSWER, "caption": f"Tom holds {KEY}."}),
        answering(f"no JSON but {KEY}"),
    ]
    made = run(server, images, tmp_path / "out", concurrency=1)
    assert "***" in json.dumps(made.set_aside)
    assert "Tom holds ***." in [row["caption"] for row in made.rows]
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err
    for path in (tmp_path / "out").rglob("*"):
        assert KEY.encode() not in path.read_bytes()


# ---- several processes, and the end of one -------------------------------------------------------


def test_kill_loses_no_answer(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 40)
    server.latency = 0.03
    store = tmp_path / "store.jsonl"
    killed = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        # However late the kill comes, there is something left to do.
        if len(server.served) >= 20:
            killed.wait()
        return ANSWER

    server.answer = answer
    ran = process(server, store, images)
    while ran.poll() is None and len(server.served) < 10:
        time.sleep(0.002)
    os.kill(ran.pid, signal.SIGKILL)
    ran.communicate()
    killed.set()
    assert ran.returncode == -signal.SIGKILL
    stored = store.read_bytes().count(b'"answer"')
    with store.open("ab") as file:
        file.write(b'{"event": "answer", "id": "torn')
    server.settle()
    before = len(server.requests)
    made = list(source(server, store)(rows_of(images), images))
    assert {row.status for row in made} == {"ok"}
    assert len(server.requests) - before == 40 - stored
    # At most the requests under way at the kill were sent a second time.
    lost = caption_store.possibly_paid(store)
    assert len(server.requests) - 40 <= len(lost) <= 4
    assert {row["reason"] for row in lost} == {"killed"}
    assert {row["sha256"] for row in lost} <= {row.sha256 for row in made}
    with opened(store) as book:
        assert book.booked >= sum(row.usd for row in made) - 1e-6
        assert book.booked == pytest.approx(40 * EACH + sum(row["usd"] for row in lost))


def test_ten_kills_at_random_moments(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 100)
    server.latency = 0.02
    store = tmp_path / "store.jsonl"
    moments = random.Random(3)
    killed = threading.Event()
    goal = 0

    def answer(body: dict[str, Any]) -> Any:
        # However late the kills come, not all pictures are answered before the last.
        if len(server.requests) > goal + 4:
            killed.wait()
        return ANSWER

    server.answer = answer
    for _ in range(10):
        goal = len(server.requests) + moments.randint(1, 8)
        killed.clear()
        ran = process(server, store, images)
        while ran.poll() is None and len(server.requests) < goal:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        ran.kill()
        ran.communicate()
        assert ran.returncode == -signal.SIGKILL
        killed.set()
        server.settle()
    kept = [line for line in lines_of(store) if line["event"] == "answer"]
    known = {line["key"] for line in kept}
    assert len(known) == len(kept) < 100
    before = len(server.requests)
    asks = source(server, store)
    made = list(asks(rows_of(images), images))
    assert {row.status for row in made} == {"ok"}
    assert len(made) == 100
    # No answer that reached this machine was asked for again.
    assert len(server.requests) - before == 100 - len(known)
    urls = {captioner.encode(images / row.file_name, 512)[0]: row.sha256 for row in made}
    again = {urls[url]: count - 1 for url, count in server.asked().items() if count > 1}
    lost = Counter(row["sha256"] for row in caption_store.possibly_paid(store))
    assert sum(again.values()) <= lost.total()
    # No kill can cost more than what was under way.
    sent = {line["id"]: line["run"] for line in lines_of(store) if line["event"] == "sent"}
    ended = {line["id"] for line in lines_of(store) if line["event"] != "sent"}
    cut = Counter(run for name, run in sent.items() if name not in ended)
    assert cut.total() == lost.total() > 0
    assert max(cut.values()) <= 4
    assert all(count <= lost[sha256] for sha256, count in again.items())
    assert server.spent <= sum(row.usd for row in made) + 1e-9
    assert not list(tmp_path.glob(".store*.lock"))  # locks of the dead were swept up


def test_two_processes_share_a_store(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 60)
    server.latency = 0.02
    store = tmp_path / "store.jsonl"
    both = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        # One may have started long before the other: nobody is answered before both have asked.
        while not both.is_set() and len(senders(store)) < 2:
            time.sleep(0.01)
        both.set()
        return ANSWER

    server.answer = answer
    pair = [process(server, store, images, timeout=600) for _ in range(2)]
    for ran in pair:
        out, _ = ran.communicate(timeout=600)
        assert ran.returncode == 0
        assert sorted(out.splitlines()) == [f"{i:02d}.png ok" for i in range(60)]
    assert set(server.asked().values()) == {1}
    assert len(server.requests) == 60
    assert caption_store.possibly_paid(store) == []
    assert len(senders(store)) == 2


def test_two_processes_share_a_budget(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 60)
    server.latency = 0.01
    store = tmp_path / "store.jsonl"
    budget = 20 * EACH
    pair = [process(server, store, images, budget=budget) for _ in range(2)]
    for ran in pair:
        _, told = ran.communicate(timeout=600)
        assert ran.returncode != 0
        assert "larger --budget" in told
    assert 0.5 * budget < server.spent <= budget


def test_what_another_process_has_under_way_is_waited_for(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    store = tmp_path / "store.jsonl"
    asks = source(server, store)
    with opened(store) as other:
        sha256 = captions.hash_file(images / "00.png")
        key = asks.key_of(sha256)
        name = other.begin(key, 0.1, 1.0, sha256=sha256)
        got = asks(rows_of(images), images)
        assert next(got).file_name == "01.png"
        assert caption_store.possibly_paid(store) == []
        answer = {"status": "ok", **ANSWER, "model": "gpt-4o", "usd": 0.01}
        timer = threading.Timer(0.3, other.end, (name, "answer"), {"key": key, **answer})
        timer.start()
        (last,) = got
        timer.join()
    assert (last.file_name, last.status, last.usd) == ("00.png", "ok", 0.01)
    assert len(server.requests) == 1


def test_store_reads_what_others_append(tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    with opened(path) as one, opened(path) as two:
        name = one.begin("k", 0.4, 1.0, sha256="s")
        with pytest.raises(caption_store.Taken):
            two.begin("k", 0.4, 1.0, sha256="s")
        with pytest.raises(caption_store.NoBudget):
            two.begin("other", 0.7, 1.0, sha256="t")
        assert two.held("k") == "process"
        one.end(name, "failed", key="k", usd=0.4, reason="silent", why="timeout")
        two.begin("other", 0.6, 1.0, sha256="t")
        assert two.booked == pytest.approx(1.0)
        (lost,) = two.possibly_paid()
        assert (lost["sha256"], lost["usd"], lost["reason"]) == ("s", 0.4, "timeout")
    # Its process is gone, the request never ended: it counts, and may be sent once more.
    with opened(path) as three:
        assert [row["reason"] for row in three.possibly_paid()] == ["timeout", "killed"]
        assert three.held("other") == ""
        assert three.booked == pytest.approx(1.0)
        with pytest.raises(caption_store.NoBudget):
            three.begin("other", 0.01, 1.0, sha256="t")


def test_a_tenth_of_the_budget_holds_through_faults(
    server: Server, tmp_path: Path, quick: None
) -> None:
    images = pictures(tmp_path / "in", 60)
    server.faults = [
        well,
        *[bill_and_hang_up, error(500), answering("no json"), silent, well] * 4,
    ]
    need, store = 60 * EACH, tmp_path / "store.jsonl"
    asks = source(server, store, budget=0.1 * need + 0.01, timeout=2.0, concurrency=3)
    got = []
    with pytest.raises(UserError, match="larger --budget"):
        got.extend(asks(rows_of(images), images))
    server.settle()  # late answers are charged for too
    assert server.spent <= asks.budget
    with opened(store) as book:
        assert server.spent <= book.booked <= asks.budget
    made = list(source(server, store, timeout=2.0)(rows_of(images), images))
    assert {row.status for row in made} == {"ok"}
    reasons = {row["reason"] for row in caption_store.possibly_paid(store)}
    assert reasons <= {"cut", "timeout"}
    assert "cut" in reasons


# ---- limits --------------------------------------------------------------------------------------


def test_durations_of_the_headers() -> None:
    for text, seconds in (
        *(("1s", 1.0), ("6m0s", 360.0), ("20ms", 0.02), ("1m2.5s", 62.5), ("1h0m1s", 3601.0)),
        *(("0", 0.0), ("12", 12.0), ("1d2h", 93600.0)),
    ):
        assert pacing.duration(text) == pytest.approx(seconds)
    for text in ("", "soon", "1 s", "5x", "s", "-1"):
        assert pacing.duration(text) is None


def test_server_limit_is_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(tmp_path / "in", 32)
    server.limit, server.window = 10, 1.0
    monkeypatch.setattr(pacing, "WINDOW", 1.0)
    begun = time.monotonic()
    made = list(source(server, tmp_path / "s.jsonl", concurrency=8)(rows_of(images), images))
    assert {row.status for row in made} == {"ok"}
    assert server.violations == 0
    assert server.most_in_window <= 10
    assert time.monotonic() - begun >= 3.0
    # The control: a client that takes no notice of the headers goes over the limit.
    monkeypatch.setattr(pacing._Limit, "learn", lambda *_: None)
    store = tmp_path / "careless.jsonl"
    list(source(server, store, concurrency=8)(rows_of(images), images))
    assert server.violations > 0


def test_what_others_use_of_a_limit_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WINDOW", 0.4)
    pacer = pacing.Pacer(threading.Event())

    def told(left: int, reset: str) -> dict[str, str]:
        kind = "x-ratelimit-{}-tokens"
        values = {"limit": "100", "remaining": str(left), "reset": reset}
        return {kind.format(name): value for name, value in values.items()}

    begun = time.monotonic()
    ticket = pacer.start(30)
    assert ticket is not None
    pacer.finish(ticket, told(40, "200ms"))
    assert pacer.start(40) is not None  # beside 30 of our own and 30 of others'
    second = pacer.start(30)
    assert second is not None
    assert time.monotonic() - begun >= 0.2
    pacer.cancel(second)
    azure = dict.fromkeys(told(0, "0"), "-1")
    pacer.finish(ticket + 1, azure)
    assert pacer.start(30) is not None


# ---- other servers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "api"),
    [
        (set(), "responses"),
        ({"responses"}, "chat_schema"),
        ({"responses", "json_schema"}, "chat_json"),
        ({"json_schema"}, "chat_json"),
        ({"responses", "json_schema", "json_object"}, "chat_text"),
    ],
)
def test_servers_that_know_less(
    server: Server, tmp_path: Path, missing: set[str], api: str
) -> None:
    images = pictures(tmp_path / "in", 6)
    server.lacks = missing
    store = tmp_path / "s.jsonl"
    made = list(source(server, store)(rows_of(images), images))
    assert {(row.status, row.api, row.caption) for row in made} == {("ok", api, ANSWER["caption"])}
    assert {row.input_tokens for row in made} == {server.tokens[0]}
    # Each step down was taken once, by the first request alone.
    steps = caption_answers.APIS.index(api)
    assert len(server.requests) == 6 + steps
    with opened(store) as book:
        assert book.booked == pytest.approx(6 * EACH)
    # The form is no part of the key: another server's answers count.
    server.lacks = set()
    again = list(source(server, store)(rows_of(images), images))
    assert again == sorted(made, key=lambda row: row.file_name)


def test_no_server_under_the_path_is_told(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 3)
    server.faults = [error(404, "Not Found")] * 2
    with pytest.raises(UserError, match=r"HTTP 404.*Not Found"):
        list(source(server, tmp_path / "s.jsonl")(rows_of(images), images))
    assert [r["path"] for r in server.requests] == ["/v1/responses", "/v1/chat/completions"]


def test_answers_without_a_count_are_booked_at_their_worst(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 3)
    server.lacks = {"responses", "usage"}
    made = list(source(server, tmp_path / "s.jsonl", concurrency=1)(rows_of(images), images))
    worst = captioner.request_tokens(
        24, 24, prompt_version="v1", price=spending.PRICES["gpt-4o"], detail="auto"
    )
    usd = spending.PRICES["gpt-4o"].usd(worst, 300)
    assert [row.usd for row in made] == [pytest.approx(usd)] * 3


def test_one_may_begin_further_down(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    asks = source(server, tmp_path / "s.jsonl", api="chat_text", detail="high")
    assert {row.api for row in asks(rows_of(images), images)} == {"chat_text"}
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    (part,) = [p for p in server.requests[0]["messages"][0]["content"] if p["type"] != "text"]
    assert part["image_url"]["detail"] == "high"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Tom is running.", "1 lines"),
        ("subjects: tom\naction: run\nplace: garden", "3 lines"),
        ("subjects: tom\naction: run\nplace: garden\ncaption: Tom.\nGlad to help!", "5 lines"),
        ("subjects: tom\nplace: garden\naction: run\ncaption: Tom runs.", "'action: …'"),
        ("Subjects: tom\naction: run\nplace: garden\ncaption: Tom runs.", "'subjects: …'"),
        ("subjects: tom\naction:\nplace: garden\ncaption: Tom runs.", "'action: …'"),
        ("subjects: dog\naction: run\nplace: garden\ncaption: A dog runs.", "'dog' is none"),
        ("subjects: tom,\naction: run\nplace: garden\ncaption: Tom runs.", "'' is none"),
    ],
)
def test_plain_text_is_refused_rather_than_guessed(text: str, told: str) -> None:
    good = "subjects: tom, jerry\naction: run\nplace: garden\ncaption: Tom: he runs.\n"
    found = caption_answers.parse_lines(good)
    assert found["subjects"] == ["tom", "jerry"]
    assert found["caption"] == "Tom: he runs."
    with pytest.raises(ValueError, match=told):
        caption_answers.parse_lines(text)


def test_bad_plain_text_is_set_aside(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    answers = iter(["chatter"] * caption_answers.ANSWERS)
    server.answer = lambda body: next(answers, ANSWER)
    asks = source(server, tmp_path / "s.jsonl", api="chat_text", concurrency=1)
    made = list(asks(rows_of(images), images))
    assert [row.status for row in made] == ["invalid", "ok"]
    assert "1 lines where 4" in made[0].reason


def test_a_model_that_is_not_there_is_no_missing_form() -> None:
    lacks = caption_answers.lacks
    assert lacks("responses", 404, "404 page not found", "")
    assert lacks("responses", 405, "Method Not Allowed", "")
    assert not lacks("responses", 404, "The model `x` does not exist", "model_not_found")
    assert not lacks("chat_schema", 404, "Not Found", "")
    assert lacks("chat_schema", 400, "response_format: unknown type", "")
    assert not lacks("chat_schema", 400, "image too large", "")
    assert not lacks("chat_text", 400, "response_format", "")
    assert not lacks("responses", 500, "json_schema", "")


def test_longest_side_is_part_of_the_question(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 1, size=200)
    store = tmp_path / "s.jsonl"
    for side, size in ((64, (64, 64)), (512, (200, 200))):
        list(source(server, store, longest_side=side)(rows_of(images), images))
        data = picture_of(server.requests[-1]).partition(";base64,")[2]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == size
    assert len(server.requests) == 2
    with pytest.raises(UserError, match="longest_side"):
        list(source(server, store, longest_side=4)(rows_of(images), images))


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
