"""The picture page: complete in itself, small, true to its decisions; its script is run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_scripts import node, runs
from PIL import Image

from tomjerry_utils import UserError, picture_page, picture_script
from tomjerry_utils.picture_review import Decision, apply, decide, read_decisions, write_decisions
from tomjerry_utils.sources import make_row

EVIL = """</script><script>alert("1")</script> & 'x' <img src=x onerror=y> \u2028"""


def sha(number: int) -> str:
    return hashlib.sha256(f"{number}".encode()).hexdigest()


def rows(total: int, **more: Any) -> list[dict[str, Any]]:
    """Every third was dropped; classes take turns, the fourth has none."""
    made = []
    for i in range(total):
        cls = ("tom", "jerry", "both", "")[i % 4]
        row = make_row("film" if i % 2 else "folder", f"images/cartoon/{i}.png", "k",
                       domain="cartoon", **{"class": cls})  # fmt: skip
        row.pop("_key")
        reason = f"blurred: sharpness {i}" if i % 3 == 2 else ""
        made.append({**row, "sha256": sha(i), "kept": not reason, "reason": reason, **more})
    return made


def noise(row: Any) -> np.ndarray:
    """At the thumbnail's own size, so that no resizing smooths it."""
    seed = int(row["file_name"].rpartition("/")[2].partition(".")[0])
    return np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)


def flat(row: Any) -> np.ndarray:
    return np.full((30, 40, 3), 90, np.uint8)


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>',
                         page.read_text(encoding="utf-8"), re.DOTALL)  # fmt: skip
    return json.loads(text)


def test_page_needs_no_network_and_escapes_what_it_shows(tmp_path: Path) -> None:
    given = rows(3)
    given[1].update(reason=EVIL, kept=False, source=EVIL, file_name=EVIL)
    decisions = {sha(1): Decision(sha(1), EVIL, "drop", note=EVIL)}
    path = picture_page.write_page(tmp_path / "p.html", given, flat, decisions)
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img src=x" not in text
    assert data_of(path)["pictures"][1]["reason"] == EVIL
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|innerHTML", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_two_hundred_pictures_make_a_small_page(tmp_path: Path) -> None:
    # Noise is the worst that a JPEG can meet.
    path = picture_page.write_page(tmp_path / "p.html", rows(200), noise, {})
    assert path.stat().st_size <= 1.5e6
    found = data_of(path)["pictures"]
    assert len(found) == 200
    kind, _, code = found[7]["picture"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (96, 96)


def test_what_cannot_be_decided_about_is_left_out_and_counted(tmp_path: Path) -> None:
    given = rows(4)
    given[0].update(sha256="", kept=False, reason="cannot be read: torn")
    given[3].update(sha256=sha(1), kept=False, reason="duplicate of images/cartoon/1.png")
    path = picture_page.write_page(tmp_path / "p.html", given, flat, {})
    assert [p["file_name"] for p in data_of(path)["pictures"]] == [
        "images/cartoon/1.png", "images/cartoon/2.png"]  # fmt: skip
    assert "2 more cannot be decided about." in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="nothing to review"):
        picture_page.write_page(tmp_path / "q.html", [given[0]], flat, {})
    assert not (tmp_path / "q.html").exists()


def test_page_starts_from_what_the_screens_said(tmp_path: Path) -> None:
    decisions = {sha(0): Decision(sha(0), "0.png", "drop"), sha(9): Decision(sha(9), "9", "keep")}
    first = picture_page.write_page(tmp_path / "p.html", apply(rows(3), decisions), flat, decisions)
    found = data_of(first)
    assert [(p["kept"], p["kind"]) for p in found["pictures"]] == [
        (True, ""), (True, ""), (False, "blurred")]  # fmt: skip
    assert list(found["decisions"]) == [sha(0)]
    assert found["others"] == [decisions[sha(9)].row()]
    second = picture_page.write_page(tmp_path / "p.html", rows(3), tmp_path, {})
    assert {p["picture"] for p in data_of(second)["pictures"]} == {""}
    scored = picture_page.write_page(
        tmp_path / "s.html", rows(2, blur=3.14159), flat, {}, score="blur"
    )
    assert {p["score"] for p in data_of(scored)["pictures"]} == {"3.14"}


# ---- its script, run -----------------------------------------------------------------------------

# Elements as a browser has them, as far as the page asks.
BROWSER = """
const { script, data, ids, storage, locked, narrow, steps } =
  JSON.parse(require("fs").readFileSync(0, "utf8"));
const listeners = {}, looks = [], files = [];
let stored = { ...storage }, active = null;
class Element {
  constructor(tag, id) {
    Object.assign(this, { tagName: tag.toUpperCase(), id, children: [], attributes: {}, on: {},
      style: {}, value: "", text: "", disabled: false });
  }
  set textContent(text) { this.text = text; this.children = []; }
  get textContent() {
    return this.text + this.children.map((c) => (c.textContent === undefined ? c : c.textContent))
      .join("");
  }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.text = ""; this.children = more; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(kind, run) { this.on[kind] = run; }
  focus() { active = this; if (this.on.focus) this.on.focus(); }
  click() { if (this.on.click) this.on.click(); else files.push([this.download, this.href]); }
}
const elements = Object.fromEntries(ids.map((id) => [id, new Element("p", id)]));
elements.data.text = data;
elements.note.tagName = "INPUT";
const fail = () => { throw new Error("denied"); };
const context = {
  document: { getElementById: (id) => elements[id] || null, body: { dataset: { key: "k" } },
    createElement: (tag) => new Element(tag),
    addEventListener: (kind, run) => { listeners[kind] = run; } },
  localStorage: locked ? { getItem: fail, setItem: fail } : {
    getItem: (name) => (name in stored ? stored[name] : null),
    setItem: (name, value) => { stored[name] = String(value); } },
  Blob: class { constructor(parts) { this.text = parts.join(""); } },
  URL: { createObjectURL: (blob) => blob.text },
  window: { matchMedia: () => ({ matches: narrow, addEventListener() {} }) } };
require("vm").runInNewContext(script, context);
const cells = () => elements.grid.children.flatMap((row) => row.children);
const acts = {
  key: (key, more) => listeners.keydown(
    { key, target: active || { tagName: "BODY" }, preventDefault() {}, ...more }),
  type: (text) => { elements.note.value = text; },
  click: (id) => { if (!elements[id].disabled) elements[id].click(); },
  press: (cell, number) =>
    cells()[cell].children.filter((c) => c.tagName === "BUTTON")[number].click(),
  pick: (cell) => cells()[cell].on.click(),
  choose: (id, value) => { elements[id].value = value; elements[id].on.change(); },
  look: () => looks.push({
    said: elements.said.textContent, place: elements.place.textContent,
    focused: active && (active.attributes["aria-label"] || active.id),
    stops: cells().filter((cell) => cell.attributes.tabindex === "0").length,
    selected: cells().findIndex((cell) => cell.attributes["aria-selected"] === "true"),
    labels: cells().map((cell) => cell.attributes["aria-label"]),
    shape: elements.grid.children.map((row) => row.children.length),
    alts: cells().map((cell) => cell.children[0].attributes.alt),
    options: elements.kind.children.map((option) => option.textContent) }) };
for (const [act, ...given] of steps) acts[act](...given);
console.log(JSON.stringify({ looks, files, storage: stored }));
"""


def browse(page: Path, steps: list[Any], storage: Any = None, **more: Any) -> Any:
    text = page.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    ids = re.findall(r'<\w+[^>]*\bid="(\w+)"', text)
    given = {"script": script, "data": json.dumps(data_of(page)), "ids": ids, "steps": steps}
    return node(
        BROWSER, {"storage": storage or {}, "locked": False, "narrow": False, **given, **more}
    )


def keys(text: str) -> list[Any]:
    return [["key", key] for key in text.split()]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return picture_page.write_page(tmp_path / "p.html", rows(30), flat, {})


@runs
def test_the_keyboard_alone_reviews_and_saves(page: Path, tmp_path: Path) -> None:
    steps = [["look"], *keys("ArrowRight d"), ["look"], *keys("ArrowDown 2 k"), ["look"],
             *keys("n"), ["look"], ["key", "d"], ["type", " a  logo "], *keys("Enter D"), ["look"],
             *keys("u 0 ArrowUp 3 s"), ["look"]]  # fmt: skip
    seen = browse(page, steps)
    start, dropped, kept, note, noted, end = seen["looks"]
    assert start["said"] == "30 pictures listed · 20 kept, 10 dropped, 0 of them decided by hand"
    assert (start["stops"], start["selected"], start["shape"]) == (1, 0, [6, 6, 6, 6])
    assert start["labels"][2] == "3 of 30, 2.png, both, dropped, blurred: sharpness 2"
    assert start["alts"][1] == "jerry, cartoon"
    assert dropped["labels"][1] == "2 of 30, 1.png, jerry, dropped by hand"
    assert dropped["said"].startswith("1.png: dropped by hand, jerry · 19 kept, 11 dropped, 1 of")
    assert dropped["focused"].startswith("3 of 30")  # a drop moves on
    # A class stays, so that K goes with it; both together are one decision.
    assert kept["labels"][8] == (
        "9 of 30, 8.png, jerry, kept by hand, "
        "class by hand, was tom; screened: blurred: sharpness 8"
    )
    assert note["focused"] == "note"
    # What is typed into the note is no command.
    assert noted["labels"][9] == "10 of 30, 9.png, jerry, dropped by hand, a logo"
    assert (noted["stops"], noted["selected"]) == (1, 10)
    assert end["said"].startswith("3 decisions saved as decisions.jsonl")
    ((name, text),) = seen["files"]
    assert name == "decisions.jsonl"
    saved = tmp_path / name
    saved.write_text(text, encoding="utf-8")
    found = read_decisions(saved)
    assert {d.file_name.rpartition("/")[2]: (d.decision, d.cls) for d in found.values()} == {
        "1.png": ("drop", ""), "8.png": ("keep", "jerry"), "3.png": ("class", "both")}  # fmt: skip
    # The very bytes that the package writes, so that a commit shows decisions alone.
    assert write_decisions(tmp_path / "again.jsonl", found.values()).read_bytes() == text.encode()


@runs
def test_the_script_decides_as_the_package_does(tmp_path: Path) -> None:
    """The same acts on the same pictures give the same file and the same rows."""
    given = rows(12)
    acts = ["keep", "drop", "tom", "jerry", "both", "clear"]
    rng = np.random.default_rng(0)
    chosen = [(int(rng.integers(12)), acts[int(rng.integers(6))], f" {EVIL} {n} " * (n % 3 == 0))
              for n in range(150)]  # fmt: skip
    decisions: dict[str, Decision] = {}
    for at, what, note in chosen:
        made = decide(given[at], what, decisions.pop(sha(at), None), note=note)
        if made:
            decisions[sha(at)] = made
    expected = write_decisions(tmp_path / "d.jsonl", decisions.values()).read_text(encoding="utf-8")
    logic = (
        picture_script.LOGIC
        + """
      const { pictures, chosen } = JSON.parse(require("fs").readFileSync(0, "utf8"));
      let session = { decisions: {}, undo: [] };
      for (const [at, what, note] of chosen) session = acted(session, pictures[at], what, note);
      const text = fileOf(session.decisions, []);
      const after = pictures.map((p) => decided(p, session.decisions[p.sha256]));
      const steps = session.undo.length;
      while (session.undo.length) session = undone(session);
      console.log(JSON.stringify({ text, after, steps, left: session.decisions }));"""
    )
    pictures = data_of(picture_page.write_page(tmp_path / "p.html", given, flat, {}))["pictures"]
    found = node(logic, {"pictures": pictures, "chosen": chosen})
    assert len(decisions) > 5
    assert found["text"] == expected
    for new, row in zip(found["after"], apply(given, decisions), strict=True):
        assert {k: new[k] for k in ("kept", "reason", "class")} == {
            k: row[k] for k in ("kept", "reason", "class")}  # fmt: skip
    assert found["steps"] > 50
    assert found["left"] == {}  # everything undone


@runs
def test_pages_turn_and_filters_list(page: Path) -> None:
    steps = [*keys("PageDown"), ["look"], *keys("PageDown End"), ["look"], *keys("Home PageUp"),
             ["look"], ["click", "after"], ["look"], ["click", "before"],
             ["choose", "state", "dropped"], ["look"], ["choose", "class", "tom"], ["look"],
             ["press", 0, 0], ["look"], ["choose", "state", "hand"], ["look"],
             ["choose", "state", ""], ["choose", "class", ""], ["choose", "kind", "blurred"],
             ["look"], ["choose", "source", "film"], ["choose", "state", "open"],
             ["choose", "kind", ""], ["look"]]  # fmt: skip
    looks = browse(page, steps)["looks"]
    assert (looks[0]["place"], looks[0]["shape"]) == ("page 2 of 2", [6])
    assert looks[1]["focused"].startswith("30 of 30")
    assert looks[2]["focused"].startswith("1 of 30")
    assert looks[3]["place"] == "page 2 of 2"
    assert looks[4]["said"].startswith("10 pictures listed")
    assert looks[4]["options"] == ["all", "blurred"]
    assert [label.split(", ")[1] for label in looks[5]["labels"]] == ["8.png", "20.png"]
    # Kept now, it stays where it is until the filter is asked again.
    assert looks[6]["labels"][0].startswith("1 of 2, 8.png, tom, kept by hand")
    assert [label.split(", ")[1] for label in looks[7]["labels"]] == ["8.png"]
    assert len(looks[8]["labels"]) == 10  # 8.png was blurred, and is kept all the same
    assert len(looks[9]["labels"]) == 15
    narrow = browse(page, [*keys("ArrowDown"), ["look"]], narrow=True)["looks"][0]
    assert narrow["shape"] == [3] * 8
    assert narrow["focused"].startswith("4 of 30")


@runs
def test_a_session_goes_on_where_it_was(page: Path) -> None:
    first = browse(page, [*keys("d d"), ["pick", 5], ["click", "jerry"], ["look"]])
    assert "3 of them" in first["looks"][0]["said"]
    second = browse(page, [["look"], *keys("u u u u"), ["look"]], first["storage"])
    assert "3 of them" in second["looks"][0]["said"]
    assert second["looks"][1]["said"].startswith("nothing to undo · 20 kept, 10 dropped, 0 of")
    locked = browse(page, [*keys("d"), ["look"]], locked=True)["looks"][0]
    assert "1 of them" in locked["said"]
    assert "this browser keeps nothing" in locked["place"]
    held = browse(
        page, [["key", "d", {"ctrlKey": True}], ["key", "d", {"metaKey": True}], ["look"]]
    )
    assert "0 of them" in held["looks"][0]["said"]


@runs
def test_decisions_about_other_pictures_are_saved_too(tmp_path: Path) -> None:
    given = {sha(i): Decision(sha(i), f"images/cartoon/{i}.png", "drop") for i in (1, 50, 60)}
    page = picture_page.write_page(tmp_path / "p.html", rows(3), flat, given)
    seen = browse(page, [*keys("ArrowRight 0 d s")])
    expected = write_decisions(tmp_path / "d.jsonl", given.values()).read_text()
    assert seen["files"] == [["decisions.jsonl", expected]]
