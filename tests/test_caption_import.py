"""Captions from elsewhere: matched by name and content, told by line, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from caption_server import Server, pictures

from tomjerry_utils import UserError, captions
from tomjerry_utils.runs import hash_file, read_jsonl


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8-sig")
    return path


def as_jsonl(path: Path, *rows: Any) -> Path:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def take(file: Path, images: Path, out: Path, **changes: Any) -> Any:
    return captions.import_folder(file, images, out, **{"model": "gpt-4o", **changes})


def test_imported_captions_are_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 4), tmp_path / "out"
    file = as_csv(
        tmp_path / "bought.csv",
        [
            {"file_name": "00.png", "caption": "Tom, at last,\nsleeps", "subjects": "tom; jerry",
             "usd": "0.003", "action": "sleep"},
            {"file_name": "02.png", "caption": "a cat", "subjects": "", "usd": "", "action": ""},
        ],
    )  # fmt: skip
    found = take(file, images, out)
    assert (found.taken, found.known, found.skipped, found.paid_elsewhere) == (2, 0, [], 0.003)
    rows = read_jsonl(out / "captions.jsonl")
    assert [(r["file_name"], r["caption"], r["api"]) for r in rows] == [
        ("00.png", "Tom, at last, sleeps", "imported"),
        ("02.png", "a cat", "imported"),
    ]
    assert rows[0]["subjects"] == ["tom", "jerry"]
    assert rows[0]["target"] == "A cat, at last, sleeps"
    assert rows[0]["usd"] == 0.0
    assert '"paid_elsewhere": 0.003' in (out / "store.jsonl").read_text()
    made = captions.caption_folder(
        images, out, base_url=server.url, model="gpt-4o", budget=1.0, concurrency=1
    )
    assert len(server.requests) == 2
    assert [row["caption"] for row in made.rows] == [
        "Tom, at last, sleeps",
        "Tom is running.",
        "a cat",
        "Tom is running.",
    ]
    again = take(file, images, out)
    assert (again.taken, again.known) == (0, 2)
    # For another model, detail or size they are no answers.
    for changes in ({"model": "gpt-4o-mini"}, {"detail": "low"}, {"longest_side": 256}):
        arguments = {"model": "gpt-4o", **changes}
        before = len(server.requests)
        captions.caption_folder(
            images, out, base_url=server.url, budget=1.0, concurrency=1, **arguments
        )
        assert len(server.requests) == before + 4


def test_what_matches_nothing_is_told_by_line(tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 5), tmp_path / "out"
    good = hash_file(images / "00.png")
    file = as_jsonl(
        tmp_path / "b.jsonl",
        {"file_name": "00.png", "caption": "one", "sha256": good.upper(), "mood": "ignored"},
        {"file_name": "01.png", "caption": "two", "sha256": good},
        "",
        {"file_name": "02.png", "caption": " "},
        {"file_name": "far.png", "caption": "four"},
        {"file_name": "03.png", "caption": "five", "model": "gpt-4o-2024-08-06"},
        {"file_name": "04.png", "caption": "six", "model": "llava"},
        {"file_name": "00.png", "caption": "again"},
    )
    found = take(file, images, out)
    assert found.taken == 2
    assert [line for line, _ in found.skipped] == [2, 4, 5, 7, 8]
    for (_, told), words in zip(
        found.skipped,
        ("sha256 differs", "caption is empty", "no such picture", "by 'llava'", "of line 1"),
        strict=True,
    ):
        assert words in told
    assert [r["caption"] for r in read_jsonl(out / "captions.jsonl")] == ["one", "five"]


def test_lines_of_csv_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 2)
    (tmp_path / "b.csv").write_text(
        'file_name,caption\n00.png,"over\ntwo lines"\nfar.png,"no\nsuch"\n'
        "01.png,ok ok\ngone.png,x\n"
    )
    found = take(tmp_path / "b.csv", images, tmp_path / "out")
    assert [line for line, _ in found.skipped] == [4, 7]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("b.csv", "file_name,words\n00.png,x\n", "line 1: no column 'caption'"),
        ("b.csv", "", "no column 'file_name'"),
        ("b.csv", "file_name,caption\n", "holds no captions"),
        ("b.csv", "file_name,caption\n00.png,one\n01.png,tom, at last\n", "line 3: not as many"),
        ("b.csv", "file_name,caption\n00.png,one\n01.png\n", "line 3: not as many"),
        ("b.csv", 'file_name,caption\n00.png,"one\n', "not valid CSV"),
        ("b.csv", "file_name,caption,usd\n00.png,one,\n01.png,two,much\n", "line 3: usd is 'much'"),
        ("b.csv", "file_name,caption,usd\n00.png,one,-1\n", "line 2: usd"),
        ("b.csv", "file_name,caption,sha256\n00.png,one,abc\n", "64 hex digits"),
        ("b.jsonl", '{"file_name": "00.png", "caption": "one"}\n{', "line 2: not valid JSON"),
        ("b.jsonl", "[]\n", "line 1: not a caption"),
        ("b.jsonl", '{"file_name": "00.png"}\n', "line 1: no column 'caption'"),
        ("b.jsonl", '{"file_name": "00.png", "caption": 3}\n', "'caption' is not a text"),
        ("b.jsonl", '{"file_name": "00.png", "caption": "x", "subjects": 3}\n', "'subjects'"),
        ("b.jsonl", '{"file_name": "far.png", "caption": "x"}\n', "line 1: far.png: no such"),
        ("b.txt", "x", "cannot read '.txt'"),
    ],
)
def test_nothing_of_a_broken_file_is_taken(tmp_path: Path, name: str, text: str, told: str) -> None:
    images = pictures(tmp_path / "in", 2)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        take(tmp_path / name, images, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 1)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        take(tmp_path / "b.csv", images, tmp_path / "out")
    with pytest.raises(UserError, match="no file"):
        take(tmp_path / "none.csv", images, tmp_path / "out")
    with pytest.raises(UserError, match="is a folder"):
        take(images, images, tmp_path / "out")


def test_captions_of_another_model_stay(tmp_path: Path) -> None:
    images, out = pictures(tmp_path / "in", 2), tmp_path / "out"
    take(as_jsonl(tmp_path / "a.jsonl", {"file_name": "00.png", "caption": "one"}), images, out)
    other = as_jsonl(tmp_path / "b.jsonl", {"file_name": "01.png", "caption": "two"})
    take(other, images, out, model="human", prompt_version="none")
    assert [r["caption"] for r in read_jsonl(out / "captions.jsonl")] == ["one"]
    assert take(other, images, out, model="human", prompt_version="none").known == 1
