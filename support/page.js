"use strict";
// Draws what show.py has written into the page. Text of a model is untrusted: it becomes text nodes
// alone, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (x, digits = 4) => x === null || x === undefined ? "–" : x.toFixed(digits);

// What a token can be coloured by: a value, blue above 0 and orange below it
const COLOURS = {
  "change of log p": (row, t) => row.after ? row.after[t] - row.before[t] : null,
  "log p before": (row, t) => row.before[t],
  "log p after": (row, t) => row.after ? row.after[t] : null,
  "advantage": (row) => row.advantage,
};

function colours(group) {
  const has = (f) => group.rows.some((row) => row.tokens.some((_, t) => Number.isFinite(f(row, t))));
  return Object.keys(COLOURS).filter((name) => has(COLOURS[name]));
}

function paint(spans, group, value) {
  let most = 1e-9;
  const values = spans.map(([row, t]) => value(row, t));
  for (const x of values) if (Number.isFinite(x)) most = Math.max(most, Math.abs(x));
  spans.forEach(([, , span], i) => {
    const x = values[i];
    const hue = x > 0 ? "--up" : "--down";
    span.style.background = Number.isFinite(x) && x !== 0
      ? `rgb(var(${hue}) / ${(0.6 * Math.abs(x) / most).toFixed(3)})` : "none";
  });
}

function describe(row, t) {
  const parts = [`${JSON.stringify(row.tokens[t])}`, `log p ${number(row.before[t])}`];
  if (row.after) {
    parts[1] += ` → ${number(row.after[t])}`;
    parts.push(`change ${number(row.after[t] - row.before[t])}`);
  }
  parts.push(`advantage ${number(row.advantage)}`);
  if (row.clipped && row.clipped[t]) parts.push("clipped: no gradient");
  at("detail").textContent = `token ${t + 1} of ${row.tokens.length}:  ${parts.join("   ")}`;
}

function drawRow(row, index, spans) {
  const box = element("div", row.is_gold ? "row gold" : "row");
  const facts = element("div", "facts");
  const head = element("div", "", `row ${index} `);
  if (row.is_gold) head.append(element("span", "mark", "gold"));
  facts.append(head);
  const lines = [
    ["reward", number(row.reward, 3)], ["advantage", number(row.advantage)],
    ["tokens", `${row.tokens.length}${row.finished ? "" : ", cut off"}`]];
  if (row.ratio !== undefined) lines.push(["ratio", row.ratio.map((x) => number(x)).join(" → ")]);
  for (const [name, value] of lines) {
    const line = element("div", "", `${name} `);
    line.append(element("b", "", value));
    facts.append(line);
  }
  const text = element("p", "tokens");
  text.tabIndex = 0;
  text.setAttribute("aria-label", `row ${index}: ${row.tokens.join("")}`);
  const mine = row.tokens.map((token, t) => {
    const span = element("span", row.clipped && row.clipped[t] ? "clipped" : "", token);
    spans.push([row, t, span]);
    text.append(span);
    return span;
  });
  let current = -1;
  const choose = (t) => {
    if (t < 0 || t >= mine.length) return;
    if (current >= 0) mine[current].classList.remove("current");
    current = t;
    mine[t].classList.add("current");
    describe(row, t);
  };
  mine.forEach((span, t) => span.addEventListener("mouseenter", () => choose(t)));
  mine.forEach((span, t) => span.addEventListener("click", () => choose(t)));
  text.addEventListener("focus", () => choose(Math.max(current, 0)));
  text.addEventListener("keydown", (event) => {
    const to = {ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: mine.length - 1};
    if (!(event.key in to)) return;
    event.preventDefault();
    choose(to[event.key]);
  });
  box.append(facts, text);
  return box;
}

function drawGroup(index) {
  const group = data.groups[index];
  at("at").textContent = group.step;
  at("facts").replaceChildren();
  for (const [name, value] of group.facts) {
    at("facts").append(element("dt", "", name), element("dd", "", value));
  }
  at("arithmetic").textContent = group.arithmetic;
  const spans = [];
  at("rows").replaceChildren(...group.rows.map((row, i) => drawRow(row, i, spans)));
  const chosen = at("colour").value;
  at("colour").replaceChildren(...colours(group).map((name) => new Option(name, name)));
  if (colours(group).includes(chosen)) at("colour").value = chosen;
  at("colour").onchange = () => paint(spans, group, COLOURS[at("colour").value]);
  at("colour").onchange();
  for (const line of document.querySelectorAll(".here")) {
    const x = 100 * (group.step - line.dataset.first) / Math.max(1, line.dataset.last - line.dataset.first);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  }
}

function drawCurve({name, points}) {
  const svg = (kind, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const steps = points.map(([step]) => step), values = points.map(([, value]) => value);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const [low, high] = [Math.min(0, ...values), Math.max(...values, 1e-9)];
  const place = ([step, value]) =>
    `${100 * (step - first) / Math.max(1, last - first)},${38 - 36 * (value - low) / (high - low)}`;
  const drawn = svg("svg", {viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img"});
  drawn.append(svg("polyline", {points: points.map(place).join(" ")}));
  const here = svg("line", {class: "here", y1: 0, y2: 40, x1: 0, x2: 0});
  here.dataset.first = first;
  here.dataset.last = last;
  drawn.append(here);
  const figure = element("figure");
  const words = `${name}: ${number(values[0], 3)} → ${number(values.at(-1), 3)}`;
  drawn.setAttribute("aria-label", words);
  figure.append(drawn, element("figcaption", "", words));
  return figure;
}

document.title = data.title;
at("title").textContent = data.title;
at("curves").replaceChildren(...data.curves.map(drawCurve));
at("steps").hidden = data.groups.length < 2;
at("step").max = data.groups.length - 1;
at("step").addEventListener("input", () => drawGroup(Number(at("step").value)));
drawGroup(0);
