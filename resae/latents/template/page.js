"use strict";
// Every text is put in as a text node: nothing in the data is read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byName = new Map();
const STEP = 100;
let shown = [];

function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "share") made.style.setProperty("--share", value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
const text = (token) => data.texts[token];
const visible = (token) => text(token).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const number = (value, digits = 3) => value === null ? "–" : Number(value.toPrecision(digits)).toString();
const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);
const short = (layer) => data.layers[layer].replace("blocks.", "").replace(".hook_resid_post", "").replace(".hook_", " ");
const nameOf = (layer, latent) => `${short(layer)}/${latent}`;
const title = (latent) => `Block ${short(latent.layer)}, latent ${latent.latent}`;

for (const latent of data.latents) {
  byName.set(nameOf(latent.layer, latent.latent), latent);
  const passages = latent.passages.concat(latent.samples);
  const words = passages.map((p) => p.tokens.map(text).join("")).concat(latent.raised.map((r) => text(r[0])));
  latent.haystack = words.join("\n").toLowerCase();
}

function link(layer, latent, label) {
  const name = nameOf(layer, latent);
  if (!byName.has(name)) return make("span", { title: "its card is not on this page" }, label);
  return make("a", { href: "#" + encodeURIComponent(name) }, label);
}

function passageOf(passage, largest) {
  const line = make("div", { class: "passage" });
  line.append(make("span", { class: "place" }, `row ${passage.row}, token ${passage.start}`));
  const acts = new Map(passage.acts);
  passage.tokens.forEach((token, i) => {
    const act = acts.get(i);
    if (act === undefined) return line.append(text(token));
    const classes = i === passage.peak ? "fires peak" : "fires";
    const share = Math.max(0.12, Math.min(1, act / largest)) * 0.75;
    line.append(make("span", { class: classes, title: `act ${number(act)}`, share }, text(token)));
  });
  return line;
}

function histogramOf(latent) {
  const largest = Math.log1p(Math.max(...latent.histogram));
  const n = latent.histogram.length;
  const range = number(n * latent.bin_width);
  const label = `Firings by act, from 0 to ${range}, logarithmic heights: ${latent.histogram.join(", ")}`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${n * 10} 50`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  latent.histogram.forEach((count, i) => {
    const height = 50 * Math.log1p(count) / largest;
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ x: i * 10 + 1, y: 50 - height, width: 8, height })) bar.setAttribute(key, value);
    const note = document.createElementNS("http://www.w3.org/2000/svg", "title");
    note.textContent = `${number(i * latent.bin_width)} to ${number((i + 1) * latent.bin_width)}: ${count} firings`;
    bar.append(note);
    svg.append(bar);
  });
  return make("div", {}, svg, make("p", { class: "soft" }, `0 to ${range}; heights are logarithmic`));
}

function tableOf(heads, rows) {
  const head = make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, h)));
  const body = rows.map((row) => make("tr", {}, ...row.map((cell) =>
    make("td", typeof cell === "string" && /^[+−-]?[\d.]/.test(cell) ? { class: "number" } : {}, cell))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function logitsOf(rows) {
  return tableOf(["token", "logit"], rows.map(([token, logit]) => [make("code", {}, visible(token)), signed(logit)]));
}

function cardOf(latent) {
  const card = make("div", { class: "card" });
  const facts = latent.firings
    ? `Fires at ${latent.firings.toLocaleString("en")} tokens (density ${number(100 * latent.density)} %); mean act ${number(latent.mean_act)}, largest ${number(latent.largest_act)}.`
    : "Never fired on this text.";
  card.append(make("p", {}, facts));
  if (latent.ablation) {
    const a = latent.ablation;
    card.append(make("p", {}, `Ablated on its strongest passages: Δ CE ${signed(a.delta_ce)}, KL ${number(a.kl)} nats per token over ${a.tokens} tokens`
      + (a.kl_at_firings === null ? "." : `; where it fires Δ CE ${signed(a.delta_ce_at_firings)}, KL ${number(a.kl_at_firings)}.`)));
  }
  for (const [heading, passages] of [["Strongest passages", latent.passages], ["Random passages", latent.samples]]) {
    if (!passages.length) continue;
    card.append(make("h3", {}, heading), ...passages.map((p) => passageOf(p, latent.largest_act)));
  }
  const columns = make("div", { class: "columns" });
  if (latent.raised.length) {
    columns.append(make("div", {}, make("h3", {}, "Makes more likely"), logitsOf(latent.raised)));
    columns.append(make("div", {}, make("h3", {}, "Makes less likely"), logitsOf(latent.lowered)));
  }
  if (latent.nearest.length) {
    const maps = latent.nearest.some((n) => n[3] !== null);
    const rows = latent.nearest.map(([layer, j, raw, moved]) =>
      [link(layer, j, nameOf(layer, j)), number(raw)].concat(maps ? [number(moved)] : []));
    columns.append(make("div", {}, make("h3", {}, "Nearest in other layers"),
      tableOf(["block/latent", "cosine"].concat(maps ? ["transported"] : []), rows)));
  }
  if (latent.histogram.length) columns.append(make("div", {}, make("h3", {}, "Firings by act"), histogramOf(latent)));
  card.append(columns);
  return card;
}

function rowOf(latent) {
  const peaks = [...new Set(latent.passages.map((p) => visible(p.tokens[p.peak])))].slice(0, 5).join(" ");
  const summary = make("summary", {}, make("b", {}, title(latent)), make("code", {}, peaks), " ",
    make("span", { class: "soft" }, latent.firings ? `${number(100 * latent.density, 2)} % of tokens` : "never fired"));
  const row = make("details", { class: "latent" }, summary);
  row.addEventListener("toggle", () => { if (row.open && row.children.length === 1) row.append(cardOf(latent)); });
  return row;
}

const ORDERS = {
  number: (a, b) => a.layer - b.layer || a.latent - b.latent,
  frequent: (a, b) => b.firings - a.firings,
  rare: (a, b) => a.firings - b.firings,
  strong: (a, b) => b.largest_act - a.largest_act,
  ablation: (a, b) => (b.ablation?.kl ?? -1) - (a.ablation?.kl ?? -1),
};
const query = document.getElementById("query"), layer = document.getElementById("layer"), order = document.getElementById("order");
const list = document.getElementById("list"), more = document.getElementById("more"), count = document.getElementById("count");

function matches(latent, wanted) {
  if (layer.value !== "" && latent.layer !== Number(layer.value)) return false;
  if (!wanted) return true;
  if (/^#\d+$/.test(wanted)) return latent.latent === Number(wanted.slice(1));
  return nameOf(latent.layer, latent.latent) === wanted || latent.haystack.includes(wanted);
}
function search() {
  const wanted = query.value.toLowerCase();
  shown = data.latents.filter((latent) => matches(latent, wanted)).sort(ORDERS[order.value]);
  list.replaceChildren();
  count.textContent = `${shown.length.toLocaleString("en")} of ${data.latents.length.toLocaleString("en")} latents`;
  showMore();
}
function showMore() {
  const from = list.children.length;
  list.append(...shown.slice(from, from + STEP).map(rowOf));
  more.hidden = list.children.length >= shown.length;
}
function choose() {
  const chosen = document.getElementById("chosen");
  let latent;
  try { latent = byName.get(decodeURIComponent(location.hash.slice(1))); } catch { latent = undefined; }
  chosen.hidden = !latent;
  if (!latent) return chosen.replaceChildren();
  const close = make("button", { type: "button", class: "close" }, "Close");
  close.addEventListener("click", () => { location.hash = ""; });
  chosen.replaceChildren(close, make("h2", {}, title(latent)), cardOf(latent));
  chosen.scrollIntoView();
  chosen.focus({ preventScroll: true });
}
function drawPrompt() {
  const table = document.getElementById("prompt");
  if (!table) return;
  const heads = ["token", ...data.layers.map((_, i) => "block " + short(i))];
  table.append(make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, h)))));
  const largest = data.layers.map((_, i) => Math.max(1e-9, ...data.prompt.strongest.flatMap((t) => t[i].map((p) => p[1]))));
  const rows = data.prompt.tokens.map((token, t) => make("tr", {}, make("th", { scope: "row" }, visible(token)),
    ...data.layers.map((_, l) => make("td", {}, ...data.prompt.strongest[t][l].map(([latent, act]) => {
      const made = link(l, latent, String(latent));
      made.append(make("small", {}, " " + number(act, 2)));
      made.style.setProperty("--share", act / largest[l]);
      return made;
    })))));
  table.append(make("tbody", {}, ...rows));
}

data.layers.forEach((_, i) => layer.append(make("option", { value: i }, "block " + short(i))));
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
query.addEventListener("input", search);
for (const choice of [layer, order]) choice.addEventListener("change", search);
more.addEventListener("click", showMore);
addEventListener("hashchange", choose);
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== query) { event.preventDefault(); query.focus(); }
  if (event.key === "Escape" && location.hash.length > 1) location.hash = "";
});
drawPrompt();
search();
choose();
