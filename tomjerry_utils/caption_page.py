"""The review of captions without a notebook: one page that needs no server and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_review import Decision, fits, recorded_caption
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import atomic_path, hash_obj
from tomjerry_utils.static_page import Loader, data_uri, document, thumbnail

PAGE = "review.html"

_WORDS = {"accept": "accepted", "edit": "edited", "reject": "rejected"}


def write_page(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions: Mapping[str, Decision],
) -> Path:
    """Write the page: each picture with its caption, to accept, edit or reject.

    What is decided stays in the browser until its button saves a `decisions.jsonl`.

    Args:
        rows: recorded captions with `file_name`, `sha256`, `caption` and `model`.
        images: the folder that file names are relative to, or what gives a row's picture as
            (H, W, 3) uint8.
        decisions: made before; the page starts from those that still fit.

    Raises:
        UserError: no rows.
    """
    if not rows:
        raise UserError(f"nothing to review for {path}: there are no captions yet")
    articles = []
    for number, row in enumerate(progress(rows, "review page", unit="picture"), start=1):
        decision = decisions.get(row["file_name"])
        if decision is not None and fits(decision, row):
            decision = None
        articles.append(_article(row, number, len(rows), thumbnail(row, images), decision))
    key = hash_obj([[row["sha256"], row["caption"]] for row in rows] + [repr(decisions)])
    body = f"{_HEADER}<main>\n" + "\n".join(articles) + "\n</main>"
    page = document("Review of captions", body, key=key, style=_STYLE, script=_SCRIPT)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def table(
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions: Mapping[str, Decision],
    *,
    limit: int = 8,
) -> str:
    """The first rows as an HTML table to look at: picture, caption, what was decided."""
    lines = []
    for row in rows[:limit]:
        decision = decisions.get(row["file_name"])
        if decision is not None and fits(decision, row):
            decision = None
        lines.append(
            f"<tr><td>{_picture(thumbnail(row, images), row)}</td>"
            f'<td style="text-align:left">{_caption(row, decision)}</td>'
            f"<td>{_WORDS[decision.decision] if decision else 'open'}</td></tr>"
        )
    more = len(rows) - limit
    below = f"<p>… and {more} more captions.</p>" if more > 0 else ""
    head = "<tr><th>picture</th><th>caption</th><th>review</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>{below}"


# ---- helpers -------------------------------------------------------------------------------------


def _picture(small: tuple[str, bytes], row: Mapping[str, Any]) -> str:
    kind, data = small
    if not kind:
        return "<em>no picture</em>"
    return f'<img alt="{escape(row["file_name"])}" src="{data_uri(kind, data)}">'


def _caption(row: Mapping[str, Any], decision: Decision | None) -> str:
    recorded = escape(recorded_caption(row))
    if decision is None or decision.decision != "edit":
        return recorded
    return f"{escape(decision.caption)}<br><s>{recorded}</s>"


def _article(
    row: Mapping[str, Any],
    number: int,
    total: int,
    small: tuple[str, bytes],
    decision: Decision | None,
) -> str:
    name, recorded = escape(row["file_name"]), escape(recorded_caption(row))
    verdict = decision.decision if decision else ""
    words = escape(decision.caption) if decision and decision.decision == "edit" else ""
    return (
        f'<article tabindex="{0 if number == 1 else -1}" aria-label="{number} of {total}: {name}" '
        f'data-name="{name}" data-sha="{escape(row["sha256"])}" data-recorded="{recorded}" '
        f'data-verdict="{verdict}" data-words="{words}">\n'
        f"{_picture(small, row)}\n"
        f'<div><p class="caption">{recorded}</p>\n'
        f'<p class="note"><strong class="state">open</strong> · {number} of {total} · {name} · '
        f"{escape(row.get('model', ''))}</p>\n"
        f'<input type="text" aria-label="new caption of {name}" value="{recorded}" hidden>\n'
        '<button type="button" data-do="accept">Accept</button> '
        '<button type="button" data-do="edit">Edit</button> '
        '<button type="button" data-do="reject">Reject</button></div>\n'
        "</article>"
    )


_HEADER = """<header>
<h1>Review of captions</h1>
<p>Keys: <kbd>↓</kbd> <kbd>↑</kbd> move, <kbd>A</kbd> accept, <kbd>E</kbd> edit
(<kbd>Enter</kbd> keeps, <kbd>Esc</kbd> drops), <kbd>R</kbd> reject, <kbd>U</kbd> undo,
<kbd>N</kbd> next open one, <kbd>D</kbd> download. <kbd>Tab</kbd> reaches every button.</p>
<p><span id="counts" role="status"></span>
<button type="button" id="download">Download decisions.jsonl</button></p>
</header>
"""

_STYLE = """
header { position: sticky; top: 0; padding: .5rem 0; background: Canvas;
  border-bottom: 1px solid GrayText; z-index: 1; }
article { display: grid; grid-template-columns: 200px 1fr; gap: 1rem; padding: .8rem;
  margin: .6rem 0; border: 1px solid GrayText; border-left-width: 8px; scroll-margin: 9rem; }
article[data-verdict="accept"] { border-left-color: #0072B2; }
article[data-verdict="edit"] { border-left-color: #E69F00; }
article[data-verdict="reject"] { border-left-color: #D55E00; }
article[data-verdict="reject"] .caption { text-decoration: line-through; }
img { width: 192px; image-rendering: auto; } .caption { font-size: 1.15rem; margin: 0; }
.note { color: GrayText; margin: .3rem 0; overflow-wrap: anywhere; }
input { width: 100%; box-sizing: border-box; margin-bottom: .4rem; }
button[aria-pressed="true"] { font-weight: bold; outline: 2px solid; }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll("article")];
const place = "captions-" + document.body.dataset.key;
const words = { accept: "accepted", edit: "edited", reject: "rejected", "": "open" };
const oneLine = (text) => text.trim().split(/\\s+/).join(" ");
let at = 0;

function load() {
  const kept = stored(place) || {};
  for (const card of cards) {
    const found = kept[card.dataset.name];
    if (found) { card.dataset.verdict = found[0]; card.dataset.words = found[1]; }
    show(card);
  }
  count();
}

function keep() {
  const kept = {};
  for (const { dataset } of cards) kept[dataset.name] = [dataset.verdict, dataset.words];
  if (!store(place, kept))
    document.getElementById("counts").textContent += " (this browser keeps nothing)";
}

function show(card) {
  const { verdict, words: edited, recorded } = card.dataset;
  card.querySelector(".caption").textContent = verdict === "edit" ? edited : recorded;
  card.querySelector(".state").textContent = words[verdict];
  for (const button of card.querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button.dataset.do === verdict));
}

function count() {
  const times = { accept: 0, edit: 0, reject: 0, "": 0 };
  for (const card of cards) times[card.dataset.verdict] += 1;
  document.getElementById("counts").textContent =
    Object.entries(times).map(([verdict, n]) => n + " " + words[verdict]).join(", ");
}

function decide(card, verdict, edited) {
  card.dataset.verdict = verdict;
  card.dataset.words = edited || "";
  show(card);
  count();
  keep();
}

function go(index) {
  if (!cards[index]) return;
  cards[at].tabIndex = -1;
  at = index;
  cards[at].tabIndex = 0;
  cards[at].focus();
}

function edit(card) {
  const input = card.querySelector("input");
  input.value = card.dataset.words || card.dataset.recorded;
  input.hidden = false;
  input.focus();
}

function close(card, save) {
  const input = card.querySelector("input"), text = oneLine(input.value);
  if (save && !text) { input.placeholder = "an edit needs words"; return false; }
  input.hidden = true;
  if (save && text === card.dataset.recorded) decide(card, "accept");
  else if (save) decide(card, "edit", text);
  return true;
}

function act(card, what) {
  if (what === "edit") return edit(card);
  decide(card, what);
  go(Math.min(at + 1, cards.length - 1));
}

function lines() {
  return cards.filter(({ dataset }) => dataset.verdict).map(({ dataset }) => JSON.stringify({
    file_name: dataset.name, sha256: dataset.sha, decision: dataset.verdict,
    caption: dataset.verdict === "edit" ? dataset.words : dataset.recorded,
    recorded: dataset.recorded }) + "\\n").join("");
}

function download() {
  offer("decisions.jsonl", lines(), "application/jsonl");
}

document.addEventListener("focusin", ({ target }) => {
  const card = target.closest("article");
  if (!card) return;
  cards[at].tabIndex = -1;
  at = cards.indexOf(card);
  card.tabIndex = 0;
});

// Words that were typed are kept, also by who leaves the box without Enter.
document.addEventListener("focusout", ({ target }) => {
  if (target.tagName !== "INPUT" || target.hidden) return;
  const card = target.closest("article"), text = oneLine(target.value);
  close(card, text !== "" && text !== (card.dataset.words || card.dataset.recorded));
});

document.addEventListener("click", ({ target }) => {
  if (target.id === "download") return download();
  const card = target.closest("article");
  if (!card) return;
  at = cards.indexOf(card);
  if (target.dataset.do) act(card, target.dataset.do);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const card = cards[at];
  if (event.target.tagName === "INPUT") {
    if (event.key === "Enter" || event.key === "Escape") {
      event.preventDefault();
      const save = event.key === "Enter";
      if (close(card, save)) go(save ? Math.min(at + 1, cards.length - 1) : at);
    }
    return;
  }
  const open = cards.findIndex((other, i) => i > at && !other.dataset.verdict);
  const keys = {
    arrowdown: () => go(at + 1), arrowright: () => go(at + 1),
    arrowup: () => go(at - 1), arrowleft: () => go(at - 1),
    home: () => go(0), end: () => go(cards.length - 1),
    a: () => act(card, "accept"), e: () => act(card, "edit"), r: () => act(card, "reject"),
    u: () => decide(card, ""), d: download,
    n: () => go(open >= 0 ? open : cards.findIndex((other) => !other.dataset.verdict)),
  };
  const run = keys[event.key.toLowerCase()];
  if (run) { event.preventDefault(); run(); }
});

load();
"""
