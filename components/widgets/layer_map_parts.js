// What the layer map is made of: nodes, symbols of conflict types, the legend. Stands before layer_map.js.
const SVG = "http://www.w3.org/2000/svg";
const TYPES = [["severe", "severe: hurts two tasks or more"], ["partial", "partial: hurts one, helps another"],
  ["mutual", "mutual: hurts none"], ["none", "none of these"]];
const SHAPES = { // in a square of 16
  severe: "M4.2 2 8 5.8 11.8 2 14 4.2 10.2 8 14 11.8 11.8 14 8 10.2 4.2 14 2 11.8 5.8 8 2 4.2z",
  mutual: "M6.4 2h3.2v4.4H14v3.2H9.6V14H6.4V9.6H2V6.4h4.4z",
  none: "M8 6.4a1.6 1.6 0 1 0 .01 0z",
};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, text] of Object.entries(attributes)) {
    if (name === "text") node.textContent = text;
    else if (text !== null) node.setAttribute(name, text);
  }
  node.append(...children);
  return node;
}

const put = (node, name, text) => { if (node.getAttribute(name) !== text) node.setAttribute(name, text); };

function symbol(type, uncertain) {
  const svg = document.createElementNS(SVG, "svg");
  const draw = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, text] of Object.entries(attributes)) node.setAttribute(name, text);
    svg.append(node);
  };
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", uncertain ? "lm-symbol lm-outline" : "lm-symbol");
  if (type === "partial") {
    draw("circle", { cx: 8, cy: 8, r: 5.6, class: "lm-ring" });
    draw("path", { d: "M8 2.4a5.6 5.6 0 0 0 0 11.2z" });
  } else draw("path", { d: SHAPES[type] || SHAPES.none });
  return svg;
}

// Gives the legend and, of its keys, the one that is shown only where some cell needs no measuring.
function makeLegend(marked) {
  const key = (kind, text, ...inside) => make("span", { class: "lm-key" }, make("i", { class: `lm-swatch ${kind}`, "aria-hidden": "true" }, ...inside), text);
  const fixed = key("lm-fixed", "known without measuring");
  const cells = [key("lm-noise", "hatched: within noise (less than 2 standard errors)"), key("lm-estimate", "dotted: estimate, not measured"),
    key("lm-missing", "empty: not measured yet"), fixed];
  const marks = TYPES.map(([type, text]) => key("lm-sign", text, symbol(type, false)));
  marks.push(key("lm-sign", "outline and ?: uncertain, rests on noise", symbol("severe", true), make("b", { text: "?" })));
  return [make("div", { class: "lm-legend" }, make("div", {}, ...cells), ...(marked ? [make("div", {}, ...marks)] : [])), fixed];
}
