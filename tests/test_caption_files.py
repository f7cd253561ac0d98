"""Folders of captions: written whole, shared, reviewed reversibly; and the stage over them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caption_server import Server, pictures

from tomjerry_utils import UserError, caption_files, captions, collect
from tomjerry_utils.caption_review import decide, write_decisions
from tomjerry_utils.captioner import Caption, OpenAISource
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import hash_file, read_jsonl, read_provenance


def run(server: Server, images: Path, out: Path, **changes: Any) -> captions.Captions:
    arguments = {"model": "gpt-4o", "budget": 1.0, "concurrency": 4, **changes}
    return captions.caption_folder(images, out, base_url=server.url, **arguments)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["file_name"] for row in rows]


def decisions(path: Path, rows: list[dict[str, Any]], *verdicts: str) -> Path:
    """The first rows decided about in order; what is no verdict is an edit."""
    made = [
        decide(row, verdict) if verdict in ("accept", "reject") else decide(row, "edit", verdict)  # type: ignore[arg-type]
        for row, verdict in zip(rows, verdicts, strict=False)
    ]
    return write_decisions(path, made)


# ---- review of a folder --------------------------------------------------------------------------


def test_review_is_applied_and_can_be_taken_back(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 4), tmp_path / "out"
    first = run(server, images, out)
    assert [(row["review"], row["edited_from"]) for row in first.rows] == [("", "")] * 4
    assert list(first.rows[0])[13:] == ["time", "api", "target", "mapped", "review", "edited_from"]
    assert first.recorded == first.rows
    file = decisions(tmp_path / "d.jsonl", first.rows, "accept", "jerry naps", "reject")
    made, skipped = captions.apply_decisions(out, file)
    assert skipped == []
    assert names(made.rows) == ["00.png", "01.png", "03.png"]
    assert [row["review"] for row in made.rows] == ["accepted", "edited", ""]
    edited = made.rows[1]
    assert (edited["caption"], edited["edited_from"]) == ("jerry naps", "Tom is running.")
    assert (edited["target"], edited["mapped"]) == ("a mouse naps", ["jerry -> mouse"])
    assert made.set_aside == [
        {"file_name": "02.png", "status": "rejected", "reason": "rejected in review"}
    ]
    assert len(read_jsonl(out / "decisions.jsonl")) == 3
    # Other decisions start from the answers, not from the edited rows.
    file = decisions(tmp_path / "d.jsonl", made.rows, "reject", "accept")
    again, _ = captions.apply_decisions(out, file)
    assert names(again.rows) == ["01.png", "02.png", "03.png"]
    assert [row["caption"] for row in again.rows] == ["Tom is running."] * 3
    assert names(again.set_aside) == ["00.png"]
    (tmp_path / "none.jsonl").write_text("")
    none, _ = captions.apply_decisions(out, tmp_path / "none.jsonl")
    assert (none.rows, none.set_aside) == (first.rows, [])
    assert len(server.requests) == 4


def test_a_later_run_keeps_the_review(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    (images / "torn.png").write_bytes(b"\x89PNG torn")
    first = run(server, images, out)
    captions.apply_decisions(
        out, decisions(tmp_path / "d.jsonl", first.rows, "a cat naps", "reject")
    )
    (images / "99.png").write_bytes((pictures(tmp_path / "more", 9) / "08.png").read_bytes())
    made = run(server, images, out)
    assert [(row["caption"], row["review"]) for row in made.rows] == [
        ("a cat naps", "edited"),
        ("Tom is running.", ""),
        ("Tom is running.", ""),
    ]
    assert [(row["file_name"], row["status"]) for row in made.set_aside] == [
        ("torn.png", "unreadable"),
        ("01.png", "rejected"),
    ]
    assert len(made.recorded) == 4


def test_outdated_decisions_are_skipped_and_told(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    first = run(server, images, out)
    given = [
        decide({**first.rows[0], "sha256": "0" * 64}, "reject"),
        decide({**first.rows[1], "caption": "Tom sat."}, "reject"),
        decide({**first.rows[2], "file_name": "no.png"}, "reject"),
        decide(first.rows[2], "reject"),
    ]
    made, skipped = captions.apply_decisions(out, write_decisions(tmp_path / "d.jsonl", given))
    assert names(made.rows) == ["00.png", "01.png"]
    assert [name for name, _ in skipped] == ["00.png", "01.png", "no.png"]
    assert names(read_jsonl(out / "decisions.jsonl")) == ["02.png"]
    # Another model's caption is another one: the decision that was kept no longer fits.
    server.answer = lambda body: {**_answer(), "caption": "Tom waits."}
    capfd.readouterr()
    other = run(server, images, out, model="gpt-4o-mini")
    assert len(other.rows) == 3
    assert "02.png: decision skipped: the caption has changed since" in capfd.readouterr().err


def _answer() -> dict[str, Any]:
    return {"subjects": ["tom"], "action": "wait", "place": "garden", "caption": ""}


def test_a_broken_review_changes_nothing(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 2), tmp_path / "out"
    run(server, images, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    (tmp_path / "d.jsonl").write_text('{"file_name": "00.png"}\n')
    with pytest.raises(UserError, match="line 1: no 'sha256'"):
        captions.apply_decisions(out, tmp_path / "d.jsonl")
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before
    with pytest.raises(UserError, match="no captions in"):
        captions.apply_decisions(tmp_path, tmp_path / "d.jsonl")
    # A run tells it before it asks, and so before it pays.
    (out / "decisions.jsonl").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run(server, images, out, model="gpt-4o-mini")
    assert len(server.requests) == 2


def test_page_is_about_the_recorded_captions(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    first = run(server, images, out)
    captions.apply_decisions(out, decisions(tmp_path / "d", first.rows, "reject", "<b>naps</b>"))
    text = captions.review_page(out, images).read_text(encoding="utf-8")
    assert text.count("<article") == 3
    assert 'data-verdict="reject"' in text
    assert "&lt;b&gt;naps&lt;/b&gt;" in text
    assert "<b>" not in text
    with pytest.raises(UserError, match="--images"):
        captions.review_page(out, None)
    with pytest.raises(UserError, match="no folder"):
        captions.review_page(out, tmp_path / "none")


# ---- who writes last -----------------------------------------------------------------------------


def test_whoever_writes_last_writes_all(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 8), tmp_path / "out"
    source = OpenAISource(out / "store.jsonl", "gpt-4o", server.url, 1.0)
    rows = [{"file_name": f"{i:02d}.png"} for i in range(8)]

    def slow(rows: Any, images: Path) -> Iterator[Caption]:
        """Sees two pictures, then stops; meanwhile another run has captioned them all."""
        given = source(rows[:2], images)
        yield from given
        run(server, images, out)
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        caption_files.write_captions(slow, rows, images, out, paid=source)
    made = caption_files.read_captions(out)
    assert len(made.rows) == 8
    assert made.usd == pytest.approx(8 * (400 * 2.5 + 40 * 10) / 1e6)
    # Without the store the second writer would have wiped what the first wrote.
    caption_files.write_captions(lambda *_: iter(list(source(rows[:2], images))), rows, images, out)
    assert len(caption_files.read_captions(out).rows) == 2


def test_two_runs_into_one_folder(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 12), tmp_path / "out"
    server.latency = 0.02
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(run(server, images, out))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(made.rows) for made in results] == [12, 12]
    assert len(server.requests) == 12
    assert len(read_jsonl(out / "captions.jsonl")) == 12
    assert not list(out.glob(".tmp-*"))


def test_reasons_of_an_earlier_run_stay(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    source = OpenAISource(out / "store.jsonl", "gpt-4o", server.url, 1.0)
    rows = [{"file_name": f"{i:02d}.png"} for i in range(3)]
    sha256 = hash_file(images / "02.png")
    failed = Caption("02.png", sha256, status="failed", reason="HTTP 500")
    caption_files.write_captions(lambda *_: iter([failed]), rows, images, out, paid=source)
    made = caption_files.write_captions(
        lambda rows, images: source(rows[:2], images), rows, images, out, paid=source
    )
    assert names(made.rows) == ["00.png", "01.png"]
    assert made.set_aside == [{"file_name": "02.png", "status": "failed", "reason": "HTTP 500"}]
    assert not run(server, images, out).set_aside


def test_what_may_have_been_paid_for_is_listed(server: Server, tmp_path: Path) -> None:
    from caption_server import hang_up, well

    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    server.faults = [well, hang_up]
    made = run(server, images, out, concurrency=1)
    assert len(made.rows) == 3
    (row,) = read_jsonl(out / "possibly_paid.jsonl")
    assert list(row) == ["file_name", "sha256", "usd", "time", "reason"]
    assert row["sha256"] == hash_file(images / row["file_name"])
    assert row["usd"] > 0
    assert row["time"]
    assert row["reason"] == "cut"


# ---- the stage -----------------------------------------------------------------------------------


def smoke(**changes: Any) -> Profile:
    profile = load_profile("smoke")
    return profile.model_copy(update={"captions": profile.captions.model_copy(update=changes)})


def test_stage_applies_a_review(own_runs: Path) -> None:
    profile = smoke()
    first = captions.ensure(profile)
    key = read_provenance(first.folder)["key"]
    decisions(captions.review_path(profile), first.recorded, "reject", "jerry naps", "accept")
    made = captions.ensure(profile)
    assert read_provenance(made.folder)["key"] != key
    assert names(made.rows) == names(first.rows)[1:]
    assert [row["review"] for row in made.rows[:3]] == ["edited", "accepted", ""]
    assert made.rows[0]["target"] == "a mouse naps"
    assert names(made.set_aside) == names(first.rows)[:1]
    assert made.recorded == first.rows
    facts = captions.statistics(made.rows)
    assert facts["captions"] == len(first.rows) - 1
    captions.review_path(profile).unlink()
    assert captions.ensure(profile).rows == first.rows
    assert read_provenance(first.folder)["key"] == key
    captions.review_path(profile).write_text("{")
    with pytest.raises(UserError, match=r"caption_review\.jsonl, line 1"):
        captions.ensure(profile)


def test_page_and_command_review_a_stage_beside_it(own_runs: Path, tmp_path: Path) -> None:
    profile = smoke()
    first = captions.ensure(profile)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    file = decisions(tmp_path / "d.jsonl", first.rows, "reject", "tom naps")
    captions.apply_decisions(first.folder, file)
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before
    assert len(read_jsonl(captions.review_path(profile))) == 2
    page = captions.review_page(first.folder, collect.ensure(profile).folder)
    assert 'data-words="tom naps"' in page.read_text(encoding="utf-8")
    assert len(captions.ensure(profile).rows) == len(first.rows) - 1


def test_stage_replays_recorded_answers(own_runs: Path, tmp_path: Path) -> None:
    plain = captions.ensure(smoke())
    assert {row["model"] for row in plain.rows} == {"scene grammar"}
    pool = plain.folder.parent / "01_collect"
    file = tmp_path / "bought.jsonl"
    bought = [
        {"file_name": n, "caption": "Tom rests.", "usd": 0.002} for n in names(plain.rows)[:5]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in bought))
    store = captions.store_path(smoke()).parent
    captions.import_folder(file, pool, store, model="gpt-4o")
    # The grammar's own replay is not touched by what is kept for another model.
    assert captions.ensure(smoke()).rows == plain.rows
    made = captions.ensure(smoke(model="gpt-4o"))
    by = {row["file_name"]: row for row in made.rows}
    assert [by[n]["model"] for n in names(plain.rows)[:6]] == ["gpt-4o"] * 5 + ["scene grammar"]
    assert by[names(plain.rows)[0]]["caption"] == "Tom rests."
    assert by[names(plain.rows)[0]]["api"] == "imported"
    assert by[names(plain.rows)[0]]["target"] == "A cat rests."
    # Other answers make other work of it.
    file.write_text(json.dumps({"file_name": names(plain.rows)[5], "caption": "Tom waits."}))
    captions.import_folder(file, pool, store, model="gpt-4o")
    assert sum(row["model"] == "gpt-4o" for row in captions.ensure(smoke(model="gpt-4o")).rows) == 6


def test_paid_stage_needs_neither_key_nor_budget_for_what_is_recorded(
    own_runs: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = smoke(source="openai", model="gpt-4o", count=4, detail="low", longest_side=64)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("TOMJERRY_CAPTION_BUDGET", "1")
    paid = captions.ensure(profile)
    assert len(paid.rows) == len(server.requests) == 4
    assert server.requests[0]["input"][0]["content"][0]["detail"] == "low"
    assert (paid.folder / "possibly_paid.jsonl").read_text() == ""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "TOMJERRY_CAPTION_BUDGET"):
        monkeypatch.delenv(name)
    decisions(captions.review_path(profile), paid.rows, "accept")
    again = captions.ensure(profile)
    assert [row["review"] for row in again.rows] == ["accepted", "", "", ""]
    assert again.usd == paid.usd > 0
    replayed = captions.ensure(smoke(model="gpt-4o", count=4, detail="low", longest_side=64))
    assert [row["usd"] for row in replayed.rows] == [row["usd"] for row in paid.rows]
    assert len(server.requests) == 4
    # How closely the model looked is part of what an answer is.
    with pytest.raises(UserError, match="TOMJERRY_CAPTION_BUDGET"):
        captions.ensure(profile.model_copy(update={"captions": smoke(
            source="openai", model="gpt-4o", count=4, detail="high").captions}))  # fmt: skip


def test_concurrency_makes_no_other_work_of_it(own_runs: Path) -> None:
    first = read_provenance(captions.ensure(smoke()).folder)
    assert read_provenance(captions.ensure(smoke(concurrency=3)).folder) == first
    other = read_provenance(captions.ensure(smoke(longest_side=640)).folder)
    assert other["key"] != first["key"]


def test_stage_without_recorded_captions_tells_both_ways_out(
    own_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = collect.ensure(load_profile("smoke"))
    bare = [{**row, "text": ""} for row in made.select(split="train")]
    monkeypatch.setattr(collect.Collection, "select", lambda self, **_: bare)
    with pytest.raises(UserError, match=r"tomjerry caption import .*captions\.source to openai"):
        captions.ensure(smoke(model="gpt-4o"))
