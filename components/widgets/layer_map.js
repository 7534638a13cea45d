// Draws the layer map and listens to it. Runs as a gr.HTML's js_on_load with `element`, `props`, `trigger` and `watch`;
// layer_map_parts.js stands before it.
// Every sentence comes from Python; here they are put in place, cells keep their nodes when their numbers change, and the
// server hears of a selection when it stands ('select').
const root = element.querySelector(".lm");
const NARROW = 720; // px below which labels stand above their rows
const CELL = { wide: 18, narrow: 9 }; // px a column has at least; below that the map scrolls in its own box
const GAP = "minmax(6px, 12px)"; // between blocks and what stands outside them
const HINT = "Click a cell, or drag across columns, to select layers.";
const KEYS = "Arrow keys move, Enter selects the layer, Shift with an arrow key selects several, Escape clears the selection.";
let value = null, parts = null; // what is drawn, and its nodes
let selected = new Set(), chosen = { row: "", column: "" }, sent = ""; // the selection and what the server knows of it
let at = { row: 0, column: 0 }, anchor = 0; // the cell that Tab reaches, and where a range starts
let press = null, timer = 0, tipped = null; // a pointer that is down, a message on its way, the cell of the tooltip

// ---- the page ----------------------------------------------------------------------------------------------------

function build() {
  hideTip();
  root.replaceChildren();
  parts = null;
  if (!value.rows.length || !value.columns.length) {
    root.append(make("p", { class: "lm-empty", text: value.note || "There is nothing to show yet." }));
    return;
  }
  parts = { columns: value.columns.map(buildHead), rows: value.rows.map(buildRow), marks: value.marks.map(buildMark) };
  parts.places = tracks();
  for (const cells of [parts.columns, ...lines()]) cells.forEach((node, c) => node.style.setProperty("--at", String(parts.places[c])));
  const grid = make("div", { class: "lm-grid", role: "grid", "aria-label": root.dataset.name, "aria-multiselectable": "true",
    "aria-description": KEYS, "aria-rowcount": String(lines().length + 1), "aria-colcount": String(value.columns.length + 1) });
  grid.append(make("div", { class: "lm-row lm-head", role: "row" }, make("div", { class: "lm-label", role: "columnheader" },
    make("span", { text: "layer" })), ...parts.columns));
  value.rows.forEach((row, r) => grid.append(line(row, parts.rows[r], row.strong ? " lm-strong" : "")));
  if (parts.marks.length) grid.append(line({ label: "type", title: "" }, parts.marks, " lm-marks"));
  parts.bands = make("div", { class: "lm-bands", "aria-hidden": "true", role: "presentation" });
  grid.append(parts.bands);
  parts.grid = grid;
  parts.scroll = make("div", { class: "lm-scroll" }, grid);
  parts.said = make("span", { class: "lm-said", role: "status" });
  parts.clear = make("button", { type: "button", class: "lm-clear", text: "Clear" });
  parts.clear.addEventListener("click", () => { select([]); emit(); parts.grid.querySelector('[tabindex="0"]').focus(); });
  parts.scale = ["low", "zero", "high"].map((side) => make("span", { class: `lm-${side}` }));
  parts.note = make("p", { class: "lm-note" });
  parts.tip = make("div", { class: "lm-tip", "aria-hidden": "true" });
  parts.tip.hidden = true;
  const [legend, fixed] = makeLegend(parts.marks.length > 0);
  parts.fixed = fixed;
  const scale = make("div", { class: "lm-scale" }, make("div", { class: "lm-bar" }), make("div", { class: "lm-ends" }, ...parts.scale));
  root.append(make("div", { class: "lm-top" }, make("div", { class: "lm-status" }, parts.said, parts.clear), scale), parts.scroll,
    legend, parts.note, parts.tip);
  listen(grid);
  fit();
}

const line = (row, cells, extra) => make("div", { class: `lm-row${extra}`, role: "row" },
  make("div", { class: "lm-label", role: "rowheader", "aria-description": row.title || null, "data-title": row.title },
    make("span", { text: row.label })), ...cells);
const lines = () => (parts.marks.length ? [...parts.rows, parts.marks] : parts.rows);

function buildHead(column, c) {
  return make("div", { class: "lm-column", role: "columnheader", "aria-label": column.title, "data-c": String(c),
    "data-outside": String(column.outside) }, make("span", { text: column.label }));
}
const buildRow = (_, r) => value.columns.map((_, c) => make("div", { class: "lm-cell", role: "gridcell", tabindex: "-1",
  "data-r": String(r), "data-c": String(c) }));
const buildMark = (_, c) => make("div", { class: "lm-cell lm-mark", role: "gridcell", tabindex: "-1", "data-r": String(value.rows.length),
  "data-c": String(c) });

// One track per column and one more wherever blocks meet what stands outside them. Gives each column's grid line.
function tracks() {
  const widths = [], places = [];
  value.columns.forEach((column, c) => {
    if (c && column.outside !== value.columns[c - 1].outside) widths.push(GAP);
    places.push(widths.length + 1);
    widths.push("minmax(var(--cell), 1fr)");
  });
  root.style.setProperty("--tracks", widths.join(" "));
  return places;
}

// ---- drawing -----------------------------------------------------------------------------------------------------

function draw() {
  root.setAttribute("aria-busy", String(Boolean(value.busy)));
  if (!parts) return;
  const { limit, warm } = value.scale;
  value.rows.forEach((row, r) => row.cells.forEach((cell, c) => {
    const node = parts.rows[r][c], before = node.dataset.state;
    const side = !cell.value ? "zero" : (cell.value > 0) === (warm === "high") ? "warm" : "cool";
    put(node, "data-state", cell.state);
    put(node, "data-side", side);
    put(node, "class", `lm-cell${cell.noise ? " lm-noise" : ""}`);
    put(node, "aria-label", `${value.columns[c].title}, ${row.label}: ${cell.text}`);
    const strength = cell.value === null ? "0%" : `${(100 * Math.min(1, Math.abs(cell.value) / limit)).toFixed(1)}%`;
    if (node.style.getPropertyValue("--p") !== strength) node.style.setProperty("--p", strength);
    if (before && before !== "exact" && cell.state === "exact") flash(node);
  }));
  value.marks.forEach((mark, c) => {
    const node = parts.marks[c], face = `${mark.type} ${mark.uncertain}`;
    put(node, "aria-label", `${value.columns[c].title}: ${mark.text}`);
    if (node.dataset.face === face) return;
    put(node, "data-face", face);
    node.replaceChildren(symbol(mark.type, mark.uncertain), ...(mark.uncertain ? [make("b", { text: "?" })] : []));
  });
  put(root, "data-warm", warm);
  ["low", "zero", "high"].forEach((side, i) => { parts.scale[i].textContent = value.scale[side]; });
  parts.note.textContent = value.note;
  parts.fixed.hidden = !value.rows.some((row) => row.cells.some((cell) => cell.state === "fixed"));
  drawSelection();
  if (tipped) showTip(tipped);
}

function drawSelection() {
  const keys = value.columns.map((column) => selected.has(column.key)), runs = [];
  keys.forEach((on, c) => {
    put(parts.columns[c], "data-selected", String(on));
    for (const row of lines()) put(row[c], "aria-selected", String(on));
    if (on && keys[c - 1]) runs.at(-1)[1] = c;
    else if (on) runs.push([c, c]);
  });
  parts.bands.replaceChildren(...runs.map(([from, to]) => {
    const band = make("div", { class: "lm-band" });
    band.style.setProperty("--at", String(parts.places[from]));
    band.style.setProperty("--to", String(parts.places[to] + 1));
    return band;
  }));
  lines().forEach((row, r) => row.forEach((node, c) => put(node, "tabindex", r === at.row && c === at.column ? "0" : "-1")));
  const named = runs.map(([from, to]) => value.columns[from].label + (to > from ? `–${value.columns[to].label}` : ""));
  const said = selected.size === 1 ? `${value.columns[keys.indexOf(true)].title} selected` : `${selected.size} selected: ${named.join(", ")}`;
  if (parts.said.textContent !== (selected.size ? said : HINT)) parts.said.textContent = selected.size ? said : HINT;
  parts.clear.hidden = !selected.size;
}

// An estimate that gives way to a measured number is seen to do so; without motion where people asked for none.
function flash(node) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const ring = getComputedStyle(root).getPropertyValue("--lm-ring");
  node.dataset.fresh = "true";
  const light = node.animate([{ boxShadow: `0 0 0 2px ${ring}` }, { boxShadow: `0 0 0 2px ${still ? ring : "transparent"}` }], 1600);
  light.onfinish = () => { delete node.dataset.fresh; };
}

// Labels of columns thin out, or stand upright, where columns are narrower than their text.
function fit() {
  if (!parts || !root.clientWidth) return;
  const narrow = root.clientWidth < NARROW;
  put(root, "data-narrow", String(narrow));
  root.style.setProperty("--cell", `${narrow ? CELL.narrow : CELL.wide}px`);
  const width = parts.rows[0][0].getBoundingClientRect().width + 2, blocks = value.columns.findIndex((column) => !column.outside);
  const text = (c) => parts.columns[c].firstChild.getBoundingClientRect();
  put(root, "data-upright", "false");
  const outside = value.columns.flatMap((column, c) => (column.outside ? [text(c).width] : []));
  const widest = Math.max(0, ...value.columns.flatMap((column, c) => (column.outside ? [] : [text(c).width]))) + 8;
  put(root, "data-upright", String(Math.max(0, ...outside) > width + 4));
  const step = [1, 2, 5, 10, 20].find((many) => many * width >= widest) || 50;
  value.columns.forEach((column, c) => put(parts.columns[c], "data-quiet", String(!column.outside && (c - blocks) % step !== 0)));
  put(parts.grid, "data-scrolls", String(parts.scroll.scrollWidth > parts.scroll.clientWidth + 1));
  parts.scroll.style.scrollPaddingLeft = narrow ? "" : `${parts.columns[0].parentNode.firstChild.offsetWidth}px`; // labels stay in front
  fade();
  hideTip();
}

const fade = () => put(parts.scroll, "data-more", String(parts.scroll.scrollLeft + parts.scroll.clientWidth < parts.scroll.scrollWidth - 1));

// ---- the tooltip -------------------------------------------------------------------------------------------------

function showTip(node) {
  tipped = node;
  const { r, c, title } = node.dataset, row = value.rows[r], column = value.columns[c], mark = value.marks[c];
  if (title !== undefined) parts.tip.replaceChildren(make("b", { text: node.textContent }), make("p", { text: title }));
  else if (!row && !mark) return hideTip();
  else {
    parts.tip.replaceChildren(make("b", { text: row ? `${column.title} · ${row.label}` : column.title }));
    if (row) parts.tip.append(make("p", { text: row.cells[c].text }));
    if (mark) parts.tip.append(make("p", { class: row ? "lm-aside" : "" }, symbol(mark.type, mark.uncertain), make("span", { text: mark.text })));
  }
  parts.tip.hidden = false;
  const box = root.getBoundingClientRect(), cell = node.getBoundingClientRect(), tip = parts.tip.getBoundingClientRect();
  const left = Math.min(box.width - tip.width, Math.max(0, cell.left + cell.width / 2 - box.left - tip.width / 2));
  const above = cell.top - box.top - tip.height - 8;
  parts.tip.style.transform = `translate(${left}px, ${above >= -8 && cell.top - tip.height > 8 ? above : cell.bottom - box.top + 8}px)`;
}

function hideTip() {
  tipped = null;
  if (parts && parts.tip) parts.tip.hidden = true;
}

// ---- what a person does ------------------------------------------------------------------------------------------

const keyAt = (column) => value.columns[column].key;
const range = (from, to) => value.columns.slice(Math.min(from, to), Math.max(from, to) + 1).map((column) => column.key);

function select(keys) {
  selected = new Set(keys);
  drawSelection();
}

function toggle(column) {
  const keys = new Set(selected);
  if (!keys.delete(keyAt(column))) keys.add(keyAt(column));
  select(keys);
}

function moveTo(row, column, focus = true) {
  at = { row: Math.min(lines().length - 1, Math.max(0, row)), column: Math.min(value.columns.length - 1, Math.max(0, column)) };
  drawSelection();
  if (focus) lines()[at.row][at.column].focus({ preventScroll: press !== null });
}

function emit(wait = 0) {
  clearTimeout(timer);
  chosen = selected.size ? { row: value.rows[at.row] ? value.rows[at.row].key : "", column: keyAt(at.column) } : { row: "", column: "" };
  timer = setTimeout(() => { // a held key is many changes but one message
    timer = 0;
    const message = { selected: value.columns.map((column) => column.key).filter((key) => selected.has(key)), ...chosen };
    if (JSON.stringify(message) === sent) return;
    sent = JSON.stringify(message);
    props.value = { ...props.value, ...message };
    trigger("select", message);
  }, wait);
}

function pressed(event) {
  const { row, column } = at, last = { row: lines().length - 1, column: value.columns.length - 1 };
  const many = event.ctrlKey || event.metaKey;
  const steps = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
    Home: [many ? 0 : row, 0], End: [many ? last.row : row, last.column] };
  if (steps[event.key]) {
    moveTo(...steps[event.key]);
    if (!event.shiftKey) anchor = at.column;
    else if (at.column !== column || !selected.size) { select(range(anchor, at.column)); emit(150); }
  } else if (event.key === "Enter" || event.key === " ") {
    if (many) toggle(column);
    else select(event.shiftKey ? range(anchor, column) : [keyAt(column)]);
    if (!event.shiftKey) anchor = column;
    emit(150);
  } else if (event.key === "Escape" && (selected.size || tipped)) {
    hideTip();
    if (selected.size) { select([]); emit(); }
  } else return;
  event.preventDefault();
}

function columnNear(x) {
  const centers = parts.rows[0].map((node) => { const box = node.getBoundingClientRect(); return Math.abs(box.left + box.width / 2 - x); });
  return centers.indexOf(Math.min(...centers));
}

function down(event) {
  const node = event.target.closest("[data-c]");
  if (!node || event.button !== 0) return;
  const column = Number(node.dataset.c), row = node.dataset.r === undefined ? at.row : Number(node.dataset.r);
  press = { id: event.pointerId, touch: event.pointerType === "touch", many: event.ctrlKey || event.metaKey, shift: event.shiftKey, row, column, to: column };
  if (press.touch) return; // a finger may be about to scroll: it selects when it moves sideways or lifts
  event.preventDefault();
  parts.grid.setPointerCapture(event.pointerId);
  moveTo(row, column);
  if (press.shift) select(range(anchor, column));
  else if (press.many) toggle(column);
  else select([keyAt(column)]);
  if (!press.shift) anchor = column;
}

function dragged(event) {
  if (!press || event.pointerId !== press.id) {
    const node = event.target.closest("[data-r], [data-title]:not([data-title=''])");
    if (node && event.pointerType !== "touch") showTip(node); else if (!event.target.closest(".lm-cell")) hideTip();
    return;
  }
  if (press.many || (press.touch && parts.grid.dataset.scrolls === "true")) return;
  const column = columnNear(event.clientX);
  if (column === press.to) return;
  if (press.touch && press.to === press.column) anchor = press.column;
  press.to = column;
  moveTo(press.row, column);
  select(range(anchor, column));
  showTip(lines()[at.row][column]);
}

function up(event) {
  if (!press || event.pointerId !== press.id) return;
  const { touch, row, column, to } = press;
  if (touch && to === column) {
    anchor = column;
    moveTo(row, column);
    select([keyAt(column)]);
  }
  press = null;
  emit();
}

function listen(grid) {
  grid.addEventListener("keydown", pressed);
  grid.addEventListener("pointerdown", down);
  grid.addEventListener("pointermove", dragged);
  grid.addEventListener("pointerup", up);
  grid.addEventListener("pointercancel", () => { press = null; });
  grid.addEventListener("pointerleave", () => { if (!press && !grid.contains(document.activeElement)) hideTip(); });
  grid.addEventListener("focusin", (event) => {
    const node = event.target.closest("[data-r]");
    if (node) { at = { row: Number(node.dataset.r), column: Number(node.dataset.c) }; showTip(node); }
  });
  grid.addEventListener("focusout", hideTip);
  parts.scroll.addEventListener("scroll", () => { fade(); if (tipped) showTip(tipped); });
}

// ---- from the server ---------------------------------------------------------------------------------------------

// What decides whether nodes can stay: everything but the numbers, the marks and the sentences.
const face = (one) => JSON.stringify([one.columns, one.marks.length > 0, one.rows.map((row) => [row.key, row.label, row.title, row.strong])]);

function receive() {
  const before = value, old = before && parts ? { row: before.rows[at.row], column: before.columns[at.column].key } : null;
  value = { rows: [], columns: [], marks: [], note: "", busy: false, selected: null, ...props.value };
  const focused = Boolean(parts) && parts.grid.contains(document.activeElement);
  const keys = value.columns.map((column) => column.key);
  if (value.selected && !press) {
    selected = new Set(value.selected);
    sent = ""; // whatever is chosen next is news
  }
  selected = new Set([...selected].filter((key) => keys.includes(key)));
  if (!selected.has(chosen.column)) chosen = { row: "", column: "" };
  if (!before || face(before) !== face(value)) {
    const row = old && old.row ? value.rows.findIndex((one) => one.key === old.row.key) : 0;
    at = { row: Math.max(0, row), column: Math.max(0, old ? keys.indexOf(old.column) : 0) };
    anchor = at.column;
    build();
  }
  draw();
  if (parts && focused && !parts.grid.contains(document.activeElement)) moveTo(at.row, at.column);
  // What another handler reads from this component is what is selected here, whoever sent the value last.
  const message = { selected: keys.filter((key) => selected.has(key)), ...chosen };
  const { selected: had, row, column } = value;
  if (JSON.stringify({ selected: had, row, column }) !== JSON.stringify(message)) props.value = { ...props.value, ...message };
}

new ResizeObserver(fit).observe(root);
watch("value", receive);
receive();
