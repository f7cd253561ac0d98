"""Captions through the Batch API, over real HTTP on a loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from caption_server import (
    KEY,
    Server,
    create_and_hang_up,
    error,
    hang_up,
    no_json,
    pictures,
    silent,
)

from tomjerry_utils import (
    UserError,
    batch_server,
    caption_batches,
    caption_requests,
    caption_store,
    captioner,
)

HALF = 0.5 * (400 * 2.5 + 40 * 10) / 1e6  # dollars that an answer costs in a batch


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_server, "LONGEST_WAIT", 0.01)


def source(server: Server, folder: Path, **changes: Any) -> captioner.OpenAISource:
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 2, **changes}
    return captioner.OpenAISource(folder / "store.jsonl", base_url=server.url, **arguments)


def rows_of(images: Path) -> list[dict[str, Any]]:
    return [{"file_name": path.name} for path in sorted(images.iterdir())]


def run(
    server: Server, images: Path, folder: Path, *, rows: Any = None, budget: float = 1.0, **how: Any
) -> list[captioner.Caption]:
    given = rows_of(images) if rows is None else rows
    asks = source(server, folder, budget=budget)
    found = caption_batches.run_batches(asks, given, images, folder, **{"poll": 0.01, **how})
    return sorted(found, key=lambda row: row.file_name)


def lines(folder: Path, event: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "store.jsonl").read_text().splitlines()]
    return [line for line in found if event in ("", line["event"])]


# ---- a run ---------------------------------------------------------------------------------------


def test_pictures_are_captioned_at_half_the_price(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 7), tmp_path / "out"
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    (images / "torn.png").write_bytes(b"\x89PNG torn")
    made = run(server, images, out, shard_requests=3)
    assert [row.status for row in made] == ["ok"] * 8 + ["unreadable"]
    assert len(server.batches) == 3
    assert sum(row.usd for row in made) == pytest.approx(7 * HALF) == server.spent
    assert {row.request_id[:5] for row in made[:-1]} == {"breq_"}
    assert all(row.time for row in made[:-1])
    # What went up is what the API takes.
    (first, *_) = server.batches.values()
    assert (first["endpoint"], first["completion_window"]) == ("/v1/responses", "24h")
    sent = [json.loads(line) for line in server.files[first["input_file_id"]].splitlines()]
    assert {(line["method"], line["url"]) for line in sent} == {("POST", "/v1/responses")}
    assert len({line["custom_id"] for line in sent}) == 3
    assert sent[0]["body"]["text"]["format"]["strict"] is True
    # Each intent was there before its batch.
    events = [line["event"] for line in lines(out) if line["event"].startswith("batch")]
    assert events[:2] == ["batch", "batch_created"]
    calls = len(server.calls)
    assert run(server, images, out)[:8] == made[:8]
    assert len(server.calls) == calls


def test_shards_are_cut_by_bytes(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 6)
    run(server, images, tmp_path / "out", shard_bytes=8000)
    sizes = [len(file) for name, file in server.files.items() if name[5:].isdecimal()]
    assert len(sizes) > 1
    assert max(sizes) <= 8000


def test_lines_are_judged_as_direct_answers_are(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 6)
    server.line_faults = [
        *("well", "500", "missing", "nonsense", "400", "refusal"),
        *("well", "well", "well", "refusal"),
    ]
    made = run(server, images, tmp_path / "out")
    assert Counter(row.status for row in made) == {"ok": 4, "refused": 2}
    assert {row.reason for row in made if row.reason} == {
        "invalid_image: odd picture",
        "refused: I cannot",
    }
    assert len(server.batches) == 2
    # The missing line may have been billed: it is booked and listed.
    (lost,) = caption_store.possibly_paid(tmp_path / "out" / "store.jsonl")
    assert lost["reason"] == "missing"
    assert sum(row.usd for row in made) == pytest.approx(server.spent + lost["usd"])


def test_lines_that_never_work_are_set_aside(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    server.line_faults = ["well", *["500"] * caption_requests.ATTEMPTS]
    made = run(server, images, tmp_path / "out")
    assert Counter(row.status for row in made) == {"ok": 1, "failed": 1}
    assert len(server.batches) == caption_requests.ATTEMPTS


def test_expired_batches_go_on(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 8)
    server.ends = ["expired"]
    made = run(server, images, tmp_path / "out")
    assert {row.status for row in made} == {"ok"}
    assert len(server.batches) == 2
    assert set(Counter(server.served).values()) == {1}
    assert sum(row.usd for row in made) == pytest.approx(8 * HALF) == server.spent


def test_failed_validation_says_why(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 4)
    server.ends = ["failed"]
    with pytest.raises(UserError, match="line 3: line is no JSON"):
        run(server, images, tmp_path / "out")
    with caption_store_of(tmp_path / "out") as book:
        assert book.booked == pytest.approx(0.0, abs=1e-12)
    assert {row.status for row in run(server, images, tmp_path / "out")} == {"ok"}


def test_a_full_queue_is_waited_for(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 8)
    server.ends = ["crowded"]
    made = run(server, images, tmp_path / "alone")
    assert {row.status for row in made} == {"ok"}
    sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert sizes == [0, 4, 4]  # too large by itself: in halves
    server.batches.clear()
    server.ends = ["completed", "crowded"]
    made = run(server, images, tmp_path / "beside", shard_requests=4)
    assert {row.status for row in made} == {"ok"}
    sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert sizes == [4, 0, 4]  # its turn came when the other was done
    server.ends = ["crowded", "crowded", "crowded"]
    with pytest.raises(UserError, match="queue is full"):
        run(server, images, tmp_path / "never", rows=rows_of(images)[:2], shard_requests=1)


def test_cancelled_batches_give_what_they_have(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 4)
    server.ends = ["cancelled"]
    got = caption_batches.run_batches(
        source(server, tmp_path / "out"), rows_of(images), images, tmp_path / "out", poll=0.01
    )
    assert [next(got).status for _ in range(2)] == ["ok", "ok"]
    with pytest.raises(UserError, match="cancelled at the server: its 2 unanswered"):
        next(got)
    made = run(server, images, tmp_path / "out")
    assert {row.status for row in made} == {"ok"}
    assert set(Counter(server.served).values()) == {1}


def test_server_trouble_is_survived(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 4)
    server.admin_faults = {
        "POST /files": [error(500), hang_up],
        "POST /batches": [error(429, retry_after="0"), create_and_hang_up],
        "GET /batches": [error(503), hang_up],
        "GET /files": [hang_up],
    }
    made = run(server, images, tmp_path / "out")
    assert {row.status for row in made} == {"ok"}
    assert len(server.batches) == 1
    assert server.spent == pytest.approx(4 * HALF)


def test_servers_without_batches_are_told_apart(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    server.admin_faults = {"POST /files": [error(404, "Not Found")]}
    with pytest.raises(UserError, match="caption run"):
        run(server, images, tmp_path / "out")
    server.admin_faults = {"POST /batches": [error(400, "billing limit", code="odd")]}
    with pytest.raises(UserError, match="billing limit"):
        run(server, images, tmp_path / "out")
    assert server.batches == {}
    with caption_store_of(tmp_path / "out") as book:
        assert book.booked == pytest.approx(0.0, abs=1e-12)


# ---- money ---------------------------------------------------------------------------------------


def caption_store_of(folder: Path) -> Any:
    return contextlib.closing(caption_store.Store(folder / "store.jsonl"))


def test_budget_holds_for_batches(server: Server, tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 30)
    budget = 12 * HALF
    with pytest.raises(UserError, match="larger --budget"):
        run(server, images, tmp_path / "out", budget=budget)
    # Batch by batch, as true prices leave room.
    assert len(server.batches) > 1
    assert 0.5 * budget < server.spent <= budget
    done = len(server.served)
    made = run(server, images, tmp_path / "out")
    assert {row.status for row in made} == {"ok"}
    assert len(server.served) == 30
    assert done > 0


def test_dear_answers_make_the_next_batch_smaller(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 30), tmp_path / "out"
    server.tokens = (20_000, 200)
    each = (20_000 * 2.5 + 200 * 10) / 1e6
    asks = source(server, out)
    assert [row.usd for row in asks(rows_of(images)[:1], images)] == [each]
    budget = 6.1 * each
    with pytest.raises(UserError, match="larger --budget"):
        run(server, images, out, budget=budget)
    assert server.spent == pytest.approx(6 * each)


def test_a_batch_holds_its_worst_price_until_it_ends(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 6), tmp_path / "out"
    server.polls = 1000
    assert run(server, images, out, wait=False) == []
    with caption_store_of(out) as book:
        assert book.in_batches == 6
        assert book.booked > 6 * HALF
    # Direct requests leave these pictures alone.
    direct = list(source(server, out)(rows_of(images), images))
    assert {row.status for row in direct} == {"pending"}
    assert "tomjerry caption batch" in direct[0].reason
    assert server.requests == []
    server.polls = 0
    assert {row.status for row in run(server, images, out, wait=False)} == {"ok"}
    assert len(server.batches) == 1


# ---- the end of a process ------------------------------------------------------------------------


def process(server: Server, images: Path, folder: Path) -> subprocess.Popen[str]:
    arguments = {"model": "gpt-4o", "budget": 1.0, "base_url": server.url}
    call = (
        "from pathlib import Path; from tomjerry_utils import caption_batches, captioner\n"
        f"out, images = Path({str(folder)!r}), Path({str(images)!r})\n"
        f"source = captioner.OpenAISource(out / 'store.jsonl', **{arguments!r})\n"
        f"list(caption_batches.run_batches(source, {rows_of(images)!r}, images, out, poll=0.01))\n"
    )
    return subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.PIPE, text=True)


def killed(ran: subprocess.Popen[str], ready: Any) -> None:
    while ran.poll() is None and not ready():
        time.sleep(0.002)
    ran.kill()
    ran.communicate()
    assert ran.returncode == -9


def test_batch_whose_reply_was_lost_to_a_kill_is_found(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 5), tmp_path / "out"
    # Older batches of others fill the first pages of the list.
    foreign = {"endpoint": "/v1/responses", "input_file_id": "x", "completion_window": "24h"}

    def created_then_silent(handler: Any) -> bool:
        server.create_batch(json.loads(handler.body))
        for _ in range(3):
            server.create_batch(foreign)
        silent(handler)
        return True

    server.admin_faults = {"POST /batches": [created_then_silent]}
    killed(process(server, images, out), lambda: len(server.batches) == 4)
    server.settle()
    (intent,) = lines(out, "batch")
    assert len(intent["requests"]) == 5
    assert not lines(out, "batch_created")
    made = run(server, images, out)
    assert {row.status for row in made} == {"ok"}
    assert len(server.batches) == 4
    assert server.spent == pytest.approx(5 * HALF)


def test_kill_before_the_creation_makes_one_batch(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 5), tmp_path / "out"
    server.admin_faults = {"POST /files": [silent]}
    killed(process(server, images, out), lambda: "POST /files" in server.calls)
    server.settle()
    assert len(lines(out, "batch")) == 1
    assert server.batches == {}
    made = run(server, images, out)
    assert {row.status for row in made} == {"ok"}
    assert len(lines(out, "batch")) == len(server.batches) == 1


def test_kill_while_results_come_down_bills_once(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 5), tmp_path / "out"
    run(server, images, out)
    # As if it had been killed after three of the answers.
    store = out / "store.jsonl"
    kept = store.read_text().splitlines()
    answers = [number for number, line in enumerate(kept) if '"event": "answer"' in line]
    store.write_text("\n".join(kept[: answers[3]]) + "\n" + kept[answers[3]][:40])
    made = run(server, images, out)
    assert {row.status for row in made} == {"ok"}
    assert sum(row.usd for row in made) == pytest.approx(5 * HALF)
    assert len(server.batches) == 1


def test_another_machine_needs_the_run_folder_only(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 6), tmp_path / "out"
    server.polls = 1000
    run(server, images, out, wait=False)
    there = tmp_path / "there"
    shutil.copytree(out, there)
    shutil.rmtree(out)
    shutil.rmtree(images)
    server.polls = 0
    server.line_faults = ["well", "500", "missing", "well", "nonsense", "well"]
    made = run(server, images, there, rows=[])
    assert [(row.file_name, row.status) for row in made] == [
        (f"{i:02d}.png", "ok") for i in range(6)
    ]
    # What failed was asked again, in the words of the first time.
    assert len(server.batches) == 2
    first, again = (
        {
            json.loads(line)["custom_id"]: line
            for line in server.files[batch["input_file_id"]].splitlines()
        }
        for batch in server.batches.values()
    )
    assert len(again) == 3
    assert all(first[key] == line for key, line in again.items())
    # The same with the names that the reader knows.
    assert run(server, images, there, rows=[{"file_name": "03.png"}]) == [made[3]]
    unknown = run(server, images, there, rows=[{"file_name": "new.png"}])
    assert [row.status for row in unknown] == ["unreadable"]


def test_one_process_at_the_batches_of_a_store(server: Server, tmp_path: Path) -> None:
    from filelock import FileLock

    images, out = pictures(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    with FileLock(out / "store.batches.lock"), pytest.raises(UserError, match="another process"):
        run(server, images, out)
    assert server.calls == []


def test_key_reaches_no_file_and_no_output(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    server.admin_faults = {
        "POST /batches": [error(500, f"trouble with {KEY}")],
        "GET /batches": [no_json],
    }
    replies = iter([{"refusal": f"no, {KEY}"}, f"no JSON but {KEY}"])
    server.answer = lambda body: next(replies, {"refusal": f"never, {KEY}"})
    with pytest.raises(UserError) as caught:
        server.admin_faults["GET /files"] = [error(403, f"not with {KEY}")]
        run(server, images, out)
    assert "***" in str(caught.value)
    made = run(server, images, out)
    assert {row.status for row in made} == {"refused"}
    assert "***" in made[0].reason
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + str(caught.value)
    for path in out.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
