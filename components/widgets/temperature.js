// Draws the weight temperature and listens to it. Runs as a gr.HTML's js_on_load with `element`, `props`, `trigger` and
// `watch`; temperature_math.js stands before it. While somebody drags, everything is computed here; the server hears of it
// when they let go ('release').
const M = TemperatureMath;
const root = element.querySelector(".wt");
const SVG = "http://www.w3.org/2000/svg";
const PATIENCE = 5000; // ms that an answer may take before the next message goes out without it
const ICONS = { open: "M7 10V7a5 5 0 0 1 9.6-2M5 10h14v10H5z", closed: "M7 10V7a5 5 0 0 1 10 0v3M5 10h14v10H5z" };

const state = { rows: [], includeBase: false, temperature: M.DEFAULT, shares: [], byHand: false, locked: [], unit: "" };
let kept = null; // shares last set by hand, so that a touch of the slider does not lose them
let waiting = null; // what the server was told and has not answered yet: {settings, at}
let dragging = false, startShares = null, sendTimer = 0, lines = null, parts = null;

// ---- the page ----------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function makeSvg(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function build() {
  root.replaceChildren();
  parts = { rows: state.rows.map(buildRow) };
  const lossUnit = state.unit ? `loss, ${state.unit}` : "loss";
  root.append(
    make("div", { class: "wt-head", "aria-hidden": "true" }, make("span", { text: "model" }), make("span", { text: lossUnit }),
      make("span", { text: "share of the mix" })),
    make("div", { class: "wt-rows", role: "group", "aria-label": "Shares of the mix" }, ...parts.rows.map((row) => row.node)),
  );
  parts.back = make("button", { type: "button", class: "wt-back" });
  parts.back.addEventListener("click", back);
  parts.exact = make("input", { type: "number", class: "wt-number", min: "0", step: "any", "aria-label": "Weight temperature, exact value" });
  parts.exact.addEventListener("change", () => typedTemperature(parts.exact.value));
  parts.slider = make("input", { type: "range", class: "wt-slider", min: "0", max: String(M.STEPS), step: "1", "aria-label": "Weight temperature" });
  parts.slider.addEventListener("input", () => {
    dragging = true;
    moveTo(M.temperatureAt(parts.slider.value / M.STEPS));
  });
  parts.slider.addEventListener("change", release);
  parts.curve = make("div", { class: "wt-curve" });
  parts.ticks = make("div", { class: "wt-ticks" });
  parts.message = make("div", { class: "wt-message", role: "alert" });
  parts.formula = make("div", { class: "wt-formula" });
  parts.sentence = make("p", { class: "wt-sentence" });
  root.append(
    make("div", { class: "wt-title" }, make("span", { class: "wt-label", text: "Weight temperature" }),
      make("label", {}, "T = ", parts.exact), parts.back),
    parts.message, parts.curve, make("div", { class: "wt-track" }, parts.slider), parts.ticks, parts.sentence, parts.formula,
  );
  parts.curve.addEventListener("pointerdown", (event) => {
    if (!usesFormula()) return;
    parts.curve.setPointerCapture(event.pointerId);
    dragging = true;
    moveToPointer(event);
  });
  parts.curve.addEventListener("pointermove", (event) => { if (event.buttons && dragging) moveToPointer(event); });
  for (const end of ["pointerup", "pointercancel"]) parts.curve.addEventListener(end, () => { if (dragging) release(); });
}

function buildRow(row, index) {
  const bar = make("input", { type: "range", class: "wt-bar", min: "0", max: "1", step: "0.01", "aria-label": `Share of ${row.name}` });
  const share = make("input", { type: "number", class: "wt-number", min: "0", max: "1", step: "0.01", "aria-label": `Share of ${row.name}, as a number` });
  const lock = make("button", { type: "button", class: "wt-lock", "aria-label": `Lock the share of ${row.name}`, title: "Keep this share when others change" });
  const icon = makeSvg("svg", { viewBox: "0 0 24 24", width: 16, height: 16, fill: "none", stroke: "currentColor", "stroke-width": 2, "aria-hidden": "true" }, lock);
  const path = makeSvg("path", {}, icon);
  const loss = make("span", { class: "wt-loss" });
  const name = make("span", { class: "wt-name", title: row.title || row.name }, make("i", { class: "wt-swatch" }), make("b", { text: row.name }));
  const node = make("div", { class: "wt-row" }, name, loss, bar, share, lock);
  node.style.setProperty("--c", row.color);
  let include = null;
  if (row.base) {
    include = make("input", { type: "checkbox", role: "switch", "aria-label": `Include ${row.name} in the mix` });
    include.addEventListener("change", () => {
      Object.assign(state, { includeBase: include.checked, byHand: false, locked: state.rows.map(() => false) });
      kept = null;
      change();
      release();
    });
    name.append(make("label", { class: "wt-include" }, include, "in the mix"));
  }
  bar.addEventListener("input", () => {
    dragging = true;
    hand(index, Number(bar.value));
  });
  bar.addEventListener("change", release);
  share.addEventListener("change", () => {
    const typed = share.value === "" ? NaN : Number(share.value);
    if (Number.isFinite(typed)) hand(index, typed);
    draw();
    release();
  });
  share.addEventListener("blur", draw); // what was typed gives way to the share that came of it
  lock.addEventListener("click", () => {
    state.byHand = true;
    state.locked[index] = !state.locked[index];
    change();
    release();
  });
  return { node, bar, share, lock, path, loss, include };
}

// ---- what a person does ------------------------------------------------------------------------------------------

const uses = () => M.included(state.rows, state.includeBase);
const usesFormula = () => M.measured(state.rows, uses()) && uses().filter(Boolean).length > 1;
const spread = () => Number(M.spread(state.rows, uses()).toPrecision(3));
const marks = () => [M.DEFAULT, spread()].filter((t) => t >= M.LOWEST && t <= M.HIGHEST);

function moveTo(temperature) {
  Object.assign(state, { temperature: M.tidy(temperature, marks()), byHand: false, locked: state.rows.map(() => false) });
  change();
}

function moveToPointer(event) {
  const box = parts.curve.getBoundingClientRect();
  moveTo(M.temperatureAt(Math.min(1, Math.max(0, (event.clientX - box.left - EDGE) / (box.width - 2 * EDGE)))));
}

function typedTemperature(text) {
  const typed = Number(text);
  const wrong = text.trim() === "" || !Number.isFinite(typed) || typed <= 0;
  parts.message.textContent = wrong ? `The temperature is ${text.trim() || "empty"}: it must be a number above 0 (LM-Cocktail's default is 5).` : "";
  parts.exact.setAttribute("aria-invalid", String(wrong));
  if (wrong) return;
  Object.assign(state, { temperature: typed, byHand: false, locked: state.rows.map(() => false) });
  change();
  release();
}

function hand(index, share) {
  startShares = startShares || state.shares.slice(); // proportions as they were when the drag began
  state.shares = M.setByHand(startShares, index, share, state.locked, uses());
  state.byHand = true;
  change();
}

function back() {
  if (state.byHand) Object.assign(state, { byHand: false, locked: state.rows.map(() => false) });
  else Object.assign(state, { byHand: true, shares: kept.slice() });
  change();
  release();
}

function change() {
  if (state.byHand) kept = state.shares.slice();
  else state.shares = M.shares(state.rows, uses(), state.temperature);
  draw();
}

// ---- to and from the server --------------------------------------------------------------------------------------

const settings = () => ({ temperature: state.temperature, shares: state.shares.slice(), by_hand: state.byHand,
  locked: state.locked.slice(), include_base: state.includeBase });

function release() {
  dragging = false;
  startShares = null;
  clearTimeout(sendTimer);
  sendTimer = setTimeout(send, 200); // a held arrow key is many changes but one message
}

// One message at a time: the next one waits for the answer, so that none is dropped or overtaken.
function send() {
  sendTimer = 0;
  if (waiting && Date.now() - waiting.at < PATIENCE) {
    sendTimer = setTimeout(send, 50);
    return;
  }
  const now = settings();
  if (same(now, props.value)) return;
  waiting = { settings: now, at: Date.now() };
  props.value = { ...props.value, ...now, sent: waiting.at }; // unlike any answer, so that every answer is noticed
  trigger("release");
}

function same(a, b) {
  if (!a || !b || a.by_hand !== b.by_hand || a.include_base !== b.include_base) return false;
  if (Math.abs(a.temperature - b.temperature) > 1e-9 || String(a.locked) !== String(b.locked)) return false;
  return !a.by_hand || (a.shares.length === b.shares.length && a.shares.every((s, i) => Math.abs(s - b.shares[i]) < 1e-6));
}

// The server's answer to an earlier move must not undo a later one: names and losses are always taken, settings only
// when nobody is moving anything and nothing is on its way.
function receive() {
  const value = props.value || {};
  const rows = value.rows || [];
  const rebuild = !parts || JSON.stringify(rows.map(face)) !== JSON.stringify(state.rows.map(face)) || value.unit !== state.unit;
  const otherModels = rows.map((row) => row.title).join() !== state.rows.map((row) => row.title).join();
  if (waiting && (same(waiting.settings, value) || Date.now() - waiting.at >= PATIENCE)) waiting = null;
  state.rows = rows;
  state.unit = value.unit || "";
  lines = null;
  if (otherModels || (!dragging && sendTimer === 0 && !waiting)) {
    Object.assign(state, { temperature: value.temperature || M.DEFAULT, byHand: Boolean(value.by_hand),
      includeBase: Boolean(value.include_base), locked: rows.map((_, i) => Boolean((value.locked || [])[i])) });
    if (state.byHand) state.shares = (value.shares || []).slice();
    if (state.byHand && !M.measured(rows, uses()) && isEqual()) state.byHand = false; // nobody set these
    if (otherModels) kept = null;
  }
  if (rebuild) build();
  change();
}

const face = (row) => [row.name, row.title, row.color, row.base];

// ---- drawing -----------------------------------------------------------------------------------------------------

const EDGE = 10; // half a slider thumb: the curve's axis and the slider's lie exactly above each other
const TOP = 8, PLOT = 104, BELOW = 20;
const put = (node, name, value) => { if (node.getAttribute(name) !== value) node.setAttribute(name, value); };

function draw() {
  const use = uses(), formula = usesFormula();
  put(root, "data-measured", String(formula));
  put(root, "data-by-hand", String(state.byHand));
  parts.rows.forEach((row, i) => {
    const share = state.shares[i] || 0, loss = state.rows[i].loss;
    put(row.node, "data-share", String(share));
    put(row.node, "data-in", String(use[i]));
    row.node.style.setProperty("--s", String(share));
    row.bar.value = share;
    put(row.bar, "aria-valuetext", `${share.toFixed(2)}${state.byHand ? ", set by hand" : ""}`);
    if (document.activeElement !== row.share || dragging) row.share.value = share.toFixed(2);
    row.bar.disabled = row.share.disabled = row.lock.disabled = !use[i];
    put(row.lock, "aria-pressed", String(Boolean(state.locked[i])));
    put(row.path, "d", state.locked[i] ? ICONS.closed : ICONS.open);
    row.loss.textContent = Number.isFinite(loss) ? loss.toFixed(2) : "–";
    if (row.include) row.include.checked = use[i];
  });
  parts.slider.disabled = parts.exact.disabled = !formula;
  parts.slider.value = M.STEPS * M.position(state.temperature);
  put(parts.slider, "aria-valuetext", `${M.number(state.temperature)}: ${spoken()}`);
  if (document.activeElement !== parts.exact || dragging) parts.exact.value = M.number(state.temperature);
  if (!parts.message.textContent || dragging) { parts.message.textContent = ""; parts.exact.removeAttribute("aria-invalid"); }
  const label = state.byHand && formula ? "Compute from the losses again" : !state.byHand && kept && formula ? "Back to my own shares" : "";
  parts.back.textContent = label;
  parts.back.style.visibility = label ? "visible" : "hidden";
  parts.sentence.textContent = said(formula);
  parts.formula.textContent = formulaText(formula);
  drawTicks();
  drawCurve(formula);
}

function isEqual() {
  const inMix = state.shares.filter((_, i) => uses()[i]);
  return inMix.every((share) => Math.abs(share - 1 / inMix.length) < 1e-6);
}

const spoken = () => state.rows.map((row, i) => `${row.name} ${(state.shares[i] || 0).toFixed(2)}`).join(", ");

function said(formula) {
  if (!state.byHand) return M.sentence(state.rows, uses(), state.temperature);
  const fixed = state.locked.filter(Boolean).length;
  const start = `Set by hand${fixed ? `, ${fixed} locked` : ""}: ${state.shares.filter((_, i) => uses()[i]).map((s) => s.toFixed(2)).join(" / ")}.`;
  return formula ? `${start} The losses would give ${M.shares(state.rows, uses(), state.temperature).filter((_, i) => uses()[i]).map((s) => s.toFixed(2)).join(" / ")} at T = ${M.number(state.temperature)}.` : start;
}

function formulaText(formula) {
  if (!formula) return "share = softmax(−loss / T)";
  const use = uses();
  const losses = state.rows.filter((_, i) => use[i]).map((row) => row.loss.toFixed(2)).join(", ");
  const values = M.shares(state.rows, use, state.temperature).filter((_, i) => use[i]).map((s) => s.toFixed(2)).join(", ");
  return `softmax(−(${losses}) / ${M.number(state.temperature)}) = (${values})`;
}

function drawTicks() {
  const apart = spread();
  const wanted = [[M.DEFAULT, "LM-Cocktail's default"]];
  if (usesFormula() && apart >= M.LOWEST && apart <= M.HIGHEST) wanted.push([apart, "spread of the losses"]);
  const key = JSON.stringify([wanted, parts.slider.disabled]);
  if (parts.ticks.dataset.key === key) return;
  parts.ticks.dataset.key = key;
  parts.ticks.replaceChildren(...wanted.map(([temperature, text]) => {
    const place = M.position(temperature);
    const tick = make("button", { type: "button", class: `wt-tick ${place > 0.5 ? "wt-left" : ""}`, text: `${M.number(temperature)} ${text}`,
      "aria-label": `Set the temperature to ${M.number(temperature)}, ${text}` });
    tick.style.setProperty("--at", String(place));
    tick.disabled = parts.slider.disabled;
    tick.addEventListener("click", () => { moveTo(temperature); release(); });
    return make("div", {}, tick);
  }));
}

function drawCurve(formula) {
  const width = parts.curve.clientWidth;
  if (!width) return;
  const x = (place) => EDGE + place * (width - 2 * EDGE), y = (share) => TOP + (1 - share) * PLOT;
  if (!lines || lines.width !== width || lines.use !== String(uses())) {
    parts.curve.replaceChildren();
    const svg = makeSvg("svg", { width, height: TOP + PLOT + BELOW, "aria-hidden": "true" }, parts.curve);
    for (const share of [0, 0.5, 1]) {
      makeSvg("line", { class: "wt-grid", x1: x(0), x2: x(1), y1: y(share), y2: y(share) }, svg);
      makeSvg("text", { class: "wt-axis", x: x(1), y: y(share) - 3, "text-anchor": "end" }, svg).textContent = String(share);
    }
    for (const t of [0.01, 0.1, 1, 10]) {
      const at = x(M.position(t)), anchor = t === 0.01 ? "start" : t === 10 ? "end" : "middle";
      makeSvg("line", { class: "wt-grid", x1: at, x2: at, y1: y(1), y2: y(0) }, svg);
      makeSvg("text", { class: "wt-axis", x: anchor === "start" ? 0 : anchor === "end" ? width : at, y: y(0) + 15, "text-anchor": anchor }, svg).textContent = String(t);
    }
    const dots = [];
    const now = makeSvg("line", { class: "wt-now", y1: y(1) - TOP, y2: y(0) }, svg);
    if (formula) {
      const [places, columns] = M.curve(state.rows, uses());
      state.rows.forEach((row, i) => {
        if (!uses()[i]) return;
        const points = places.map((place, k) => `${x(place).toFixed(1)},${y(columns[i][k]).toFixed(1)}`).join(" ");
        makeSvg("polyline", { class: "wt-line", points, stroke: row.color }, svg);
        dots.push([i, makeSvg("circle", { class: "wt-dot", r: 4, fill: row.color }, svg)]);
      });
    } else {
      makeSvg("text", { class: "wt-empty", x: width / 2, y: y(0.5) - 8, "text-anchor": "middle" }, svg).textContent =
        "weights against T: filled by measuring";
    }
    lines = { width, use: String(uses()), now, dots };
  }
  const at = x(M.position(state.temperature)), values = M.shares(state.rows, uses(), state.temperature);
  put(lines.now, "x1", String(at));
  put(lines.now, "x2", String(at));
  put(lines.now, "visibility", formula ? "visible" : "hidden");
  for (const [i, dot] of lines.dots) { put(dot, "cx", String(at)); put(dot, "cy", String(y(values[i]))); }
}

new ResizeObserver(() => { if (parts) drawCurve(usesFormula()); }).observe(root);
watch("value", receive);
receive();
