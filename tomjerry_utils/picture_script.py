"""The page of the picture gallery: its HTML, its style and its script.

The script has a part without a document, which decides, and a part that shows it. What it saves is
the file that `picture_review.write_decisions` would write, byte for byte.
"""

BODY = """<header>
<h1>Review of pictures</h1>
<p>Keys: <kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> move, <kbd>PgUp</kbd> <kbd>PgDn</kbd>
turn the page, <kbd>K</kbd> keep, <kbd>D</kbd> drop, <kbd>1</kbd> Tom or cat, <kbd>2</kbd> Jerry or
mouse, <kbd>3</kbd> both, <kbd>0</kbd> take the decision back, <kbd>U</kbd> undo, <kbd>N</kbd> write
a note, <kbd>S</kbd> save. <kbd>Tab</kbd> reaches every control.</p>
<p class="bar" role="group" aria-label="which pictures">
<label>show <select id="state"></select></label>
<label>class <select id="class"></select></label>
<label>source <select id="source"></select></label>
<label>reason <select id="kind"></select></label>
</p>
</header>
<main>
<div id="tools">
<p class="bar" role="group" aria-label="decide about the chosen picture">
<button type="button" id="keep">Keep</button>
<button type="button" id="drop">Drop</button>
<button type="button" id="tom">Tom / cat</button>
<button type="button" id="jerry">Jerry / mouse</button>
<button type="button" id="both">both</button>
<button type="button" id="clear">Take back</button>
<button type="button" id="undo">Undo</button>
<label>note to drops <input id="note" maxlength="120" autocomplete="off"></label>
<button type="button" id="save">Save decisions.jsonl</button>
</p>
<p id="said" role="status"></p>
</div>
<div id="grid" role="grid" aria-label="pictures"></div>
<p class="bar"><button type="button" id="before">Page before</button>
<span id="place"></span>
<button type="button" id="after">Page after</button></p>
<p><!--left--><noscript>This page needs JavaScript.</noscript></p>
</main>
<script type="application/json" id="data"><!--data--></script>"""

STYLE = """
#tools { position: sticky; top: 0; padding: .3rem 0; background: Canvas; z-index: 1;
  border-bottom: 1px solid GrayText; }
.bar { display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: center; margin: .3rem 0; }
#note { width: 10rem; } #said { margin: .3rem 0; font-weight: bold; }
[role="row"] { display: grid; gap: .5rem; margin: .5rem 0; }
[role="gridcell"] { padding: .4rem; border: 2px solid GrayText; border-radius: 4px; min-width: 0;
  scroll-margin: 9rem 0 2rem; font-size: .8rem; overflow-wrap: anywhere; }
[role="gridcell"] p { margin: .15rem 0; line-height: 1.25; }
[data-kept="true"] { border-color: #0072B2; border-top-width: 6px; }
[data-kept="false"] { border: 2px dashed #D55E00; border-top-width: 6px; }
[data-kept="false"] img { opacity: .45; }
[aria-selected="true"] { box-shadow: 0 0 0 3px #56B4E9; }
img { display: block; width: 96px; max-width: 100%; height: 96px; object-fit: contain; }
@media (max-width: 44rem) { #tools { position: static; } }
.none { width: 96px; height: 96px; max-width: 100%; } .state { font-weight: bold; }
[role="gridcell"] button { padding: 0 .3em; } [aria-pressed="true"] { font-weight: bold; }
"""

LOGIC = """
// ---- decisions as plain objects: no document, no storage

const CLASSES = ["tom", "jerry", "both"];

// What a reviewer's act makes of an earlier decision; null takes it back.
function decisionOf(picture, what, earlier, note) {
  const { sha256, file_name } = picture;
  if (what === "clear") return null;
  if (what === "drop") {
    const words = (note || "").trim().split(/\\s+/).join(" ");
    return words ? { sha256, file_name, decision: "drop", note: words }
      : { sha256, file_name, decision: "drop" };
  }
  if (what === "keep") {
    const cls = earlier && earlier.class;
    return cls ? { sha256, file_name, decision: "keep", class: cls }
      : { sha256, file_name, decision: "keep" };
  }
  const kept = earlier && earlier.decision === "keep";
  return { sha256, file_name, decision: kept ? "keep" : "class", class: what };
}

// A picture as it is with its decision.
function decided(picture, decision) {
  const { kept, reason, kind } = picture;
  const now = { kept, reason, kind, class: (decision && decision.class) || picture.class };
  if (decision && decision.decision === "keep") return { ...now, kept: true, reason: "", kind: "" };
  if (decision && decision.decision === "drop") {
    const why = "dropped by hand";
    return { ...now, kept: false, kind: why,
      reason: decision.note ? why + ": " + decision.note : why };
  }
  return now;
}

// The numbers of the pictures that fit a filter; "" fits all.
function listed(pictures, decisions, filter) {
  const fits = (picture) => {
    const decision = decisions[picture.sha256], now = decided(picture, decision);
    const state = { "": true, kept: now.kept, dropped: !now.kept, hand: Boolean(decision),
      open: !decision }[filter.state];
    return state && (!filter.class || (now.class || "none") === filter.class)
      && (!filter.source || picture.source === filter.source)
      && (!filter.kind || now.kind === filter.kind || picture.kind === filter.kind);
  };
  return pictures.map((_, i) => i).filter((i) => fits(pictures[i]));
}

// A session is { decisions, undo }; each act gives a new one.
function acted(session, picture, what, note) {
  const earlier = session.decisions[picture.sha256] || null;
  const made = decisionOf(picture, what, earlier, note);
  if (JSON.stringify(made) === JSON.stringify(earlier)) return session;
  const undo = [...session.undo, [picture.sha256, earlier]].slice(-1000);
  return { decisions: changed(session.decisions, picture.sha256, made), undo };
}

function undone(session) {
  if (!session.undo.length) return session;
  const [sha, earlier] = session.undo[session.undo.length - 1];
  return { decisions: changed(session.decisions, sha, earlier), undo: session.undo.slice(0, -1) };
}

function changed(decisions, sha, decision) {
  const { [sha]: _, ...rest } = decisions;
  return decision ? { ...rest, [sha]: decision } : rest;
}

// The file: one line a picture, in the order of the hashes.
function fileOf(decisions, others) {
  const all = [...Object.values(decisions), ...others];
  all.sort((a, b) => (a.sha256 < b.sha256 ? -1 : a.sha256 > b.sha256 ? 1 : 0));
  const line = (row) => "{" + Object.entries(row).map(([name, value]) =>
    JSON.stringify(name) + ": " + JSON.stringify(value)).join(", ") + "}\\n";
  return all.map(line).join("");
}

function counted(pictures, decisions) {
  const kept = pictures.filter((picture) => decided(picture, decisions[picture.sha256]).kept);
  const byHand = pictures.filter((picture) => decisions[picture.sha256]).length;
  return kept.length + " kept, " + (pictures.length - kept.length) + " dropped, "
    + byHand + " of them decided by hand";
}
"""

VIEW = """
// ---- what is seen

const find = (id) => document.getElementById(id);
const { pictures, decisions: before, others } = JSON.parse(find("data").textContent);
const place = "pictures-" + document.body.dataset.key;
const narrow = window.matchMedia("(max-width: 44rem)");
const PER_PAGE = 24;
let session = { decisions: before, undo: [] };
let filter = { state: "", class: "", source: "", kind: "" };
let order = [], at = 0, cells = [];

const columns = () => (narrow.matches ? 3 : 6);
const current = () => pictures[order[at]];
const startOfPage = () => at - at % PER_PAGE;

function make(tag, more, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

function say(text) {
  find("said").textContent = text + (text ? " · " : "") + counted(pictures, session.decisions);
}

function keep() {
  if (!store(place, session)) find("place").textContent += " (this browser keeps nothing)";
}

function fill(id, names) {
  const chosen = filter[id];
  const options = names.map(([value, text]) => make("option", { value }, text));
  find(id).replaceChildren(...options);
  filter[id] = names.some(([value]) => value === chosen) ? chosen : "";
  find(id).value = filter[id];
}

function fillAll() {
  const now = pictures.map((picture) => decided(picture, session.decisions[picture.sha256]));
  const some = (all) => [["", "all"], ...[...new Set(all)].sort().map((name) => [name, name])];
  fill("state", [["", "all"], ["kept", "kept"], ["dropped", "dropped"],
    ["hand", "decided by hand"], ["open", "not decided"]]);
  fill("class", some(now.map((picture) => picture.class || "none")));
  fill("source", some(pictures.map((picture) => picture.source)));
  fill("kind", some([...now, ...pictures].map(({ kind }) => kind).filter(Boolean)));
}

function list() {
  fillAll();
  order = listed(pictures, session.decisions, filter);
  at = 0;
  draw();
  say(order.length + (order.length === 1 ? " picture" : " pictures") + " listed");
}

function words(picture) {
  const decision = session.decisions[picture.sha256], now = decided(picture, decision);
  const found = picture.class || "none", moved = decision && now.class !== picture.class;
  const overruled = now.reason !== picture.reason;
  // Of a picture with a new class, kept as it was, the class alone counts as decided.
  const state = (now.kept ? "kept" : "dropped")
    + (decision && (overruled || !moved) ? " by hand" : "");
  const why = [];
  if (now.kind !== state) why.push(now.reason);
  else if (decision && decision.note) why.push(decision.note);
  if (moved) why.push("class by hand, was " + found);
  if (overruled && picture.reason) why.push("screened: " + picture.reason);
  if (picture.score) why.push("score " + picture.score);
  const told = why.filter(Boolean).join("; ");
  return { state, why: told, cls: now.class || "no class", kept: now.kept };
}

function cellOf(index) {
  const picture = pictures[order[index]], { state, why, cls, kept } = words(picture);
  const name = picture.file_name.split("/").pop();
  const image = picture.picture
    ? make("img", { src: picture.picture, alt: cls + ", " + (picture.domain || "unknown domain") })
    : make("p", { class: "none" }, "no picture");
  const press = (what, text, on) => {
    const button = make("button", { type: "button", tabindex: "-1", "aria-pressed": String(on),
      "aria-label": text + " " + name }, text);
    button.addEventListener("click", () => { choose(index); act(what, false); });
    return button;
  };
  const cell = make("div", {
    role: "gridcell", tabindex: index === at ? "0" : "-1", "data-kept": String(kept),
    "aria-selected": String(index === at), title: picture.file_name,
    "aria-label": [(index + 1) + " of " + order.length, name, cls, state, why]
      .filter(Boolean).join(", ") },
    image, make("p", { class: "state" }, state), make("p", {}, cls + " · " + picture.source),
    make("p", {}, why), press("keep", "keep", kept), " ", press("drop", "drop", !kept));
  cell.addEventListener("focus", () => choose(index));
  cell.addEventListener("click", () => choose(index));
  return cell;
}

function draw() {
  const first = startOfPage(), last = Math.min(first + PER_PAGE, order.length), rows = [];
  cells = [];
  for (let i = first; i < last; i += 1) cells.push(cellOf(i));
  for (let i = 0; i < cells.length; i += columns()) {
    const row = make("div", { role: "row" }, ...cells.slice(i, i + columns()));
    row.style.gridTemplateColumns = "repeat(" + columns() + ", minmax(0, 1fr))";
    rows.push(row);
  }
  find("grid").replaceChildren(...rows);
  find("place").textContent = order.length ? "page " + (first / PER_PAGE + 1) + " of "
    + Math.ceil(order.length / PER_PAGE) : "no picture fits";
  find("before").disabled = first === 0;
  find("after").disabled = last === order.length;
  find("undo").disabled = session.undo.length === 0;
}

function choose(index) {
  const mark = (i, chosen) => {
    const cell = cells[i - startOfPage()];
    if (!cell) return;
    cell.setAttribute("tabindex", chosen ? "0" : "-1");
    cell.setAttribute("aria-selected", String(chosen));
  };
  mark(at, false);
  at = index;
  mark(at, true);
}

function go(index, focus = true) {
  if (index < 0 || index >= order.length) return;
  const page = startOfPage();
  choose(index);
  if (startOfPage() !== page) draw();
  if (focus) cells[at - startOfPage()].focus();
}

function act(what, move = true) {
  const picture = current();
  if (!picture) return;
  session = acted(session, picture, what, find("note").value);
  draw();
  keep();
  const { state, cls } = words(picture);
  const decision = session.decisions[picture.sha256];
  const done = [state, cls, decision && decision.note].filter(Boolean).join(", ");
  say(picture.file_name.split("/").pop() + ": " + (decision ? done : "as screened"));
  cells[at - startOfPage()].focus();
  // A class is often given together with keep or drop: only those two move on.
  if (move && (what === "keep" || what === "drop")) go(at + 1);
}

function undo() {
  if (!session.undo.length) return say("nothing to undo");
  const [sha] = session.undo[session.undo.length - 1];
  session = undone(session);
  const index = order.findIndex((i) => pictures[i].sha256 === sha);
  if (index >= 0) at = index;
  draw();
  keep();
  say("undone");
  if (cells.length) cells[at - startOfPage()].focus();
}

function save() {
  const text = fileOf(session.decisions, others), number = text.split("\\n").length - 1;
  offer("decisions.jsonl", text, "application/jsonl");
  say(number + (number === 1 ? " decision" : " decisions") + " saved as decisions.jsonl");
}

for (const what of ["keep", "drop", ...CLASSES, "clear"])
  find(what).addEventListener("click", () => act(what));
find("undo").addEventListener("click", undo);
find("save").addEventListener("click", save);
find("before").addEventListener("click", () => go(startOfPage() - PER_PAGE));
find("after").addEventListener("click", () => go(startOfPage() + PER_PAGE));
for (const id of Object.keys(filter))
  find(id).addEventListener("change", () => { filter[id] = find(id).value; list(); });
narrow.addEventListener("change", draw);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { tagName } = event.target;
  if (tagName === "SELECT") return;
  if (tagName === "INPUT") {
    if (event.key === "Enter" || event.key === "Escape") {
      event.preventDefault();
      if (cells.length) cells[at - startOfPage()].focus();
    }
    return;
  }
  const within = (index) => Math.min(Math.max(index, 0), order.length - 1);
  const keys = {
    arrowright: () => go(at + 1), arrowleft: () => go(at - 1),
    arrowdown: () => go(at + columns()), arrowup: () => go(at - columns()),
    home: () => go(0), end: () => go(order.length - 1),
    pagedown: () => go(within(startOfPage() + PER_PAGE)),
    pageup: () => go(within(startOfPage() - PER_PAGE)),
    k: () => act("keep"), d: () => act("drop"), 0: () => act("clear"),
    1: () => act("tom"), 2: () => act("jerry"), 3: () => act("both"),
    u: undo, n: () => find("note").focus(), s: save,
  };
  const run = keys[event.key.toLowerCase()];
  if (run) { event.preventDefault(); run(); }
});

const again = stored(place);
if (again && again.decisions && Array.isArray(again.undo)) session = again;
list();
"""
