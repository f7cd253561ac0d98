"""The page of a forced-choice study: its HTML, its style and its script.

The script has a part without a document, a session being a plain object, and a part that shows it.
Raters see the trials of each part of the page in an order of their own, given by their name, so
that fatigue does not fall on the same trials for all; the same name goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def body(study: Mapping[str, Any], shape: tuple[int, ...], scale: int) -> str:
    """The page's body.

    Args:
        study: `page`, `questions` (name → text), `trials` (`name`, `question`, `part`, and the
            pictures `left`, `right` and `source` by number, the last or None), `pictures`.
        shape: (height, width) of all pictures.
        scale: how many times their size they are shown where there is room.
    """
    # A script element ends at its end tag, whatever stands around it.
    data = json.dumps(study, separators=(",", ":")).replace("<", "\\u003c")
    times = "at their own size" if scale == 1 else f"at {scale} times their size, unsmoothed"
    return f"""<header>
<h1>Which picture?</h1>
<p><progress id="bar" value="0" max="1" aria-label="answered"></progress>
<span id="progress" role="status"></span></p>
</header>
<main>
<form id="start">
<p>You will see two pictures at a time and one question. Choose one of the two each time, also when
it is hard to say: your first impression counts. Pictures are {shape[1]} × {shape[0]} pixels, shown
{times} (less on a small screen).</p>
<p>Keys: <kbd>←</kbd> the left one, <kbd>→</kbd> the right one, <kbd>Backspace</kbd> back to the one
before. Or tap or click the picture. You may close the page and go on later in this browser.</p>
<p><label>Your name or a code, which goes into your answers:
<input id="rater" required maxlength="40" autocomplete="off"></label>
<button>Begin</button></p>
</form>
<section id="trial" aria-labelledby="question" hidden>
<h2 id="question" tabindex="-1"></h2>
<div id="pair">
<figure id="source"><img id="cartoon" alt="the cartoon">
<figcaption>the cartoon</figcaption></figure>
<button type="button" id="left" aria-label="the left picture"><img id="first" alt=""></button>
<button type="button" id="right" aria-label="the right picture"><img id="second" alt=""></button>
</div>
</section>
<section id="end" hidden>
<h2 id="done" tabindex="-1">That was the last one. Thank you!</h2>
<p>Now save your answers and send the file to whom you have the page from.</p>
</section>
<p id="tools" hidden><button type="button" id="undo">Back to the one before</button>
<button type="button" id="download">Save my answers</button> <span id="kept"></span></p>
</main>
<script type="application/json" id="study">{data}</script>"""


def style(shape: tuple[int, ...], scale: int) -> str:
    """CSS that shows pictures at a whole multiple of their size, the largest that fits."""
    width = shape[1]
    steps = "".join(
        f"@media (max-width: {2 * width * times + 80}px)"
        f" {{ :root {{ --shown: {width * (times - 1)}px; }} }}\n"
        for times in range(scale, 1, -1)
    )
    crisp = "pixelated" if scale > 1 else "auto"
    return f"""
:root {{ --shown: {width * scale}px; }}
{steps}#pair img {{ display: block; width: min(var(--shown), 50vw - 40px); max-height: 75vh;
  object-fit: contain; image-rendering: {crisp}; }}
#pair {{ display: grid; grid-template-columns: repeat(3, auto); justify-content: center;
  align-items: start; gap: .6rem; }}
#left {{ order: 1; }} #source {{ order: 2; }} #right {{ order: 3; }}
#pair button {{ padding: 4px; border: 3px solid GrayText; border-radius: 6px; background: none;
  touch-action: manipulation; cursor: pointer; }}
#pair button:hover {{ border-color: #0072B2; }}
figure {{ margin: 0; padding: 7px; }} figcaption {{ text-align: center; }}
h2 {{ font-size: 1.2rem; text-align: center; outline: none; }}
[hidden] {{ display: none !important; }}
@media (max-width: {3 * width * scale + 140}px) {{
  #pair {{ grid-template-columns: auto auto; }}
  #source {{ order: 0; grid-column: 1 / 3; justify-self: center; }} }}
"""


def script() -> str:
    """The page's script."""
    return LOGIC + _VIEW


LOGIC = """
// ---- a session as a plain object: no document, no clock, no storage

// A text as 32 bits: Fowler, Noll and Vo's hash, 1a.
function hashed(text) {
  let hash = 2166136261;
  for (const letter of text) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  return hash >>> 0;
}

// Numbers in [0, 1): Marsaglia's xorshift, 2003.
function randomly(seed) {
  let state = seed || 1;
  return () => {
    state ^= state << 13; state ^= state >>> 17; state ^= state << 5;
    return (state >>> 0) / 4294967296;
  };
}

// The trials in this rater's order: part by part, shuffled within each.
function orderFor(study, rater) {
  const random = randomly(hashed(study.page + "/" + rater)), order = [];
  for (let warm = 0; warm < 20; warm += 1) random();
  for (const part of [...new Set(study.trials.map((trial) => trial.part))].sort((a, b) => a - b)) {
    const here = study.trials.filter((trial) => trial.part === part);
    for (let i = here.length - 1; i > 0; i -= 1) {
      const j = Math.floor(random() * (i + 1));
      [here[i], here[j]] = [here[j], here[i]];
    }
    order.push(...here);
  }
  return order;
}

function newSession(study, rater, id, now) {
  return { page: study.page, rater, session: id, started: now, undone: 0, answers: [] };
}

function nextTrial(order, session) {
  return order[session.answers.length] || null;
}

// With the answer; the session itself where all are answered.
function answered(order, session, choice, ms, now) {
  const trial = nextTrial(order, session);
  if (!trial || (choice !== "left" && choice !== "right")) return session;
  const answer = { trial: trial.name, choice, ms: Math.round(ms), at: now };
  return { ...session, answers: [...session.answers, answer] };
}

function undone(session) {
  if (!session.answers.length) return session;
  return { ...session, undone: session.undone + 1, answers: session.answers.slice(0, -1) };
}

// What was kept, if it is a session of this page and rater whose answers follow this order.
function resumed(study, order, rater, kept) {
  if (!kept || kept.page !== study.page || kept.rater !== rater) return null;
  if (!Array.isArray(kept.answers) || kept.answers.length > order.length) return null;
  const fits = kept.answers.every((answer, i) => answer.trial === order[i].name);
  return fits ? kept : null;
}

// The answers as a file.
function report(order, session) {
  const complete = session.answers.length === order.length;
  return JSON.stringify({ ...session, complete, of: order.length }, null, 1) + "\\n";
}

function fileName(rater) {
  return "answers-" + (rater.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "") || "rater")
    + ".json";
}
"""

_VIEW = """
// ---- what is seen

const find = (id) => document.getElementById(id);
const study = JSON.parse(find("study").textContent);
const place = "choice-" + study.page;
const soonest = 200; // ms: a second press of the same key is no answer to the next trial
let order = [], session = null, since = 0;

function begin(rater) {
  order = orderFor(study, rater);
  const id = [...crypto.getRandomValues(new Uint32Array(2))].map((n) => n.toString(16)).join("");
  session = resumed(study, order, rater, stored(place + "-" + rater))
    || newSession(study, rater, id, new Date().toISOString());
  store(place, rater);
  find("start").hidden = true;
  find("tools").hidden = false;
  keep();
}

function keep() {
  const kept = store(place + "-" + session.rater, session);
  find("kept").textContent = kept ? ""
    : "This browser keeps nothing: save your answers before you close the page.";
  show();
}

function show() {
  const trial = nextTrial(order, session), done = session.answers.length;
  find("bar").value = done / order.length;
  find("progress").textContent = done + " of " + order.length + " answered";
  find("undo").disabled = done === 0;
  find("trial").hidden = trial === null;
  find("end").hidden = trial !== null;
  if (!trial) return find("done").focus();
  find("question").textContent = study.questions[trial.question];
  find("source").hidden = trial.source === null;
  if (trial.source !== null) find("cartoon").src = study.pictures[trial.source];
  find("first").src = study.pictures[trial.left];
  find("second").src = study.pictures[trial.right];
  find("question").focus();
  since = performance.now();
}

function choose(choice) {
  const ms = performance.now() - since;
  if (!session || !nextTrial(order, session) || ms < soonest) return;
  session = answered(order, session, choice, ms, new Date().toISOString());
  session.screen = { shown: find("first").clientWidth, ratio: window.devicePixelRatio };
  keep();
}

function back() {
  if (!session) return;
  session = undone(session);
  keep();
}

function download() {
  offer(fileName(session.rater), report(order, session), "application/json");
}

find("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const rater = find("rater").value.trim().split(/\\s+/).join(" ");
  if (rater) begin(rater);
});
find("left").addEventListener("click", () => choose("left"));
find("right").addEventListener("click", () => choose("right"));
find("undo").addEventListener("click", back);
find("download").addEventListener("click", download);

document.addEventListener("keydown", (event) => {
  if (!session || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = {
    ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), Backspace: back,
  };
  const run = keys[event.key];
  if (run) { event.preventDefault(); run(); }
});

find("rater").value = stored(place) || "";
"""
