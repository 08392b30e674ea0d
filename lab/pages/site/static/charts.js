// The charts of the site, as SVG: lines of losses, and points of two columns. Their data stands in the page.
"use strict";

const MARGIN = { left: 58, right: 16, top: 12, bottom: 44 };

/** A new SVG element (or HTML, by `space`) in a parent. */
function make(parent, name, attributes = {}, text = "", space = "http://www.w3.org/2000/svg") {
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function makeHtml(parent, name, attributes, text) {
  return make(parent, name, attributes, text, "http://www.w3.org/1999/xhtml");
}

/** A labelled radio button or checkbox. */
function choice(parent, attributes, text, onchange) {
  const label = makeHtml(parent, "label"), input = makeHtml(label, "input", attributes);
  makeHtml(label, "span", {}, text);
  input.addEventListener("change", () => onchange(input));
  return input;
}

function written(number, digits) {
  return number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** About five round numbers between two. */
function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  const values = Array.from({ length: count }, (_, i) => (first + i) * step);
  return { values, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The ends of an axis around these numbers. */
function range(numbers) {
  const low = Math.min(...numbers), high = Math.max(...numbers);
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

/** An empty drawing with axes; x and y: {name, ends}. Its place(x, y) is where a point is drawn. */
function axes(box, x, y, title) {
  box.replaceChildren();
  const width = Math.max(280, box.clientWidth), height = Math.min(420, Math.max(280, width * 0.62));
  const about = `${title}: ${y.name} against ${x.name}. The arrow keys go from point to point.`;
  const viewBox = `0 0 ${width} ${height}`;
  const root = make(box, "svg", { viewBox, width, height, tabindex: 0, role: "img", "aria-label": about });
  const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
  const place = (a, b) => [
    MARGIN.left + ((a - x.ends[0]) / (x.ends[1] - x.ends[0])) * inner.w,
    MARGIN.top + ((y.ends[1] - b) / (y.ends[1] - y.ends[0])) * inner.h,
  ];
  const [across, up] = [ticks(...x.ends), ticks(...y.ends)], bottom = height - MARGIN.bottom;
  for (const value of across.values) {
    const [at] = place(value, 0);
    make(root, "line", { class: "grid", x1: at, x2: at, y1: MARGIN.top, y2: bottom });
    make(root, "text", { x: at, y: bottom + 16, "text-anchor": "middle" }, written(value, across.digits));
  }
  for (const value of up.values) {
    const [, at] = place(0, value);
    make(root, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at });
    make(root, "text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, written(value, up.digits));
  }
  const middle = { class: "name", "text-anchor": "middle" };
  make(root, "text", { ...middle, x: MARGIN.left + inner.w / 2, y: height - 6 }, x.name);
  const turned = `translate(12 ${MARGIN.top + inner.h / 2}) rotate(-90)`;
  make(root, "text", { ...middle, transform: turned }, y.name);
  return { root, place };
}

/** Shows the text of the point under the mouse or, by the arrow keys, of one after the other. */
function explore(box, root, points) {
  if (!points.length) return;
  const tip = makeHtml(box, "div", { class: "tip", role: "status" });
  const marker = make(root, "circle", { class: "marker", r: 6, visibility: "hidden" });
  let current = -1;
  const hide = () => { [tip.textContent, current] = ["", -1]; marker.setAttribute("visibility", "hidden"); };
  root.addEventListener("pointerleave", hide);
  const show = (index) => {
    current = index;
    const { at: [x, y], text, color } = points[index];
    marker.setAttribute("cx", x);
    marker.setAttribute("cy", y);
    marker.setAttribute("class", `marker ${color}`);
    marker.setAttribute("visibility", "visible");
    tip.textContent = text;
    tip.style.left = `${Math.min(Math.max(0, x - tip.offsetWidth / 2), box.clientWidth - tip.offsetWidth)}px`;
    tip.style.top = `${y > 70 ? y - tip.offsetHeight - 12 : y + 14}px`;
  };
  root.addEventListener("pointermove", (event) => {
    const corner = root.getBoundingClientRect();
    const mouse = [event.clientX - corner.left, event.clientY - corner.top];
    const distances = points.map(({ at }) => Math.hypot(at[0] - mouse[0], at[1] - mouse[1]));
    show(distances.indexOf(Math.min(...distances)));
  });
  root.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const from = current < 0 && move < 0 ? 0 : current; // the first step back is to the last point
    show((from + move + points.length) % points.length);
  });
}

/** The validation losses of all stages while they are trained. */
function lossCurves(figure, { stages }) {
  const ways = {
    tokens: { name: "training tokens, millions", digits: 2, of: (_, tokens) => tokens / 1e6 },
    seconds: { name: "seconds of training", digits: 0, of: (stage, tokens) => tokens / stage.tokens_per_second },
    FLOPs: { name: "FLOPs, trillions", digits: 2, of: (stage, tokens) => (tokens * stage.flops_per_token) / 1e12 },
  };
  const hidden = new Set();
  let way = ways.tokens, chosen = stages.findIndex(({ name }) => location.hash === `#${name}`);
  const draw = () => {
    const shown = stages.filter((stage) => !hidden.has(stage.name));
    const all = (get) => shown.flatMap((stage) => stage.tokens.map((tokens, i) => get(stage, i)));
    const losses = [...all((s, i) => s.mean[i] + s.std[i]), ...all((s, i) => s.mean[i] - s.std[i])];
    const furthest = Math.max(0, ...all((stage, i) => way.of(stage, stage.tokens[i])));
    const x = { name: way.name, ends: [0, 1.02 * furthest || 1] };
    const y = { name: "validation loss, nats", ends: shown.length ? range(losses) : [0, 1] };
    const { root, place } = axes(figure.querySelector(".plot"), x, y, "Losses of the stages"), points = [];
    for (const stage of shown) {
      const index = stages.indexOf(stage), color = `s${index}`;
      const bold = chosen < 1 || [index, index + 1].includes(chosen) || !shown.includes(stages[chosen]);
      const at = (i, factor) => place(way.of(stage, stage.tokens[i]), stage.mean[i] + factor * stage.std[i]);
      const indices = [...stage.tokens.keys()], below = indices.map((i) => at(i, -1)).reverse();
      const around = [...indices.map((i) => at(i, 1)), ...below];
      make(root, "polygon", { class: `band ${color}${bold ? "" : " other"}`, points: around.join(" ") });
      const means = indices.map((i) => at(i, 0));
      make(root, "polyline", { class: `curve ${color}${bold ? "" : " other"}`, points: means.join(" ") });
      for (const i of indices) {
        const std = stage.std[i] === null ? "" : ` ± ${written(stage.std[i], 3)}`; // none with a single seed
        const where = `${written(way.of(stage, stage.tokens[i]), way.digits)} ${way.name}`;
        points.push({ at: means[i], text: `${stage.label}: ${written(stage.mean[i], 3)}${std} at ${where}`, color });
      }
    }
    explore(figure.querySelector(".plot"), root, points);
  };
  const axis = makeHtml(figure.querySelector(".controls"), "fieldset");
  makeHtml(axis, "legend", {}, "loss against");
  for (const name of Object.keys(ways)) {
    const input = choice(axis, { type: "radio", name: "way", value: name }, name, () => {
      way = ways[name];
      draw();
    });
    input.checked = name === "tokens";
  }
  const legend = makeHtml(figure.querySelector(".controls"), "fieldset");
  makeHtml(legend, "legend", {}, "stages");
  stages.forEach((stage, i) => {
    const input = choice(legend, { type: "checkbox", value: stage.name, class: `s${i}` }, stage.label, () => {
      hidden[input.checked ? "delete" : "add"](stage.name);
      draw();
    });
    input.checked = true;
  });
  document.addEventListener("stage", (event) => {
    chosen = stages.findIndex(({ name }) => name === event.detail);
    draw();
  });
  new ResizeObserver(draw).observe(figure);
}

/** Two columns of the stages' figures as points with error bars, for models of one size. */
function costPoints(figure, sizes) {
  const controls = figure.querySelector(".controls"), selects = {};
  let size = sizes[0];
  const draw = () => {
    const chosen = [selects.across.value, selects.up.value];
    const columns = chosen.map((wanted) => size.columns.find(({ key }) => key === wanted));
    const rows = size.rows.filter(({ values }) => columns.every(({ key }) => values[key]));
    const ends = (key) => range(rows.flatMap((row) => row.values[key]));
    const [x, y] = columns.map(({ key, name }) => ({ name, ends: ends(key) }));
    const { root, place } = axes(figure.querySelector(".plot"), x, y, size.title), points = [], labels = [];
    for (const row of rows) {
      const color = `s${COURSE.indexOf(row.name)}`, [a, b] = columns.map(({ key }) => row.values[key]);
      const bar = (...ends) => make(root, "polyline", { class: `bar ${color}`, points: ends.join(" ") });
      if (a[1] !== undefined) bar(place(a[1], b[0]), place(a[2], b[0]));
      if (b[1] !== undefined) bar(place(a[0], b[1]), place(a[0], b[2]));
      const at = place(a[0], b[0]), late = at[0] > root.clientWidth - 90;
      make(root, "circle", { class: `point ${color}`, cx: at[0], cy: at[1], r: 5 });
      const label = { class: "label", x: at[0] + (late ? -8 : 8), "text-anchor": late ? "end" : "start" };
      const meets = (other, y) => Math.abs(other.x - label.x) < 80 && Math.abs(other.y - y) < 16;
      const spots = rows.map((other) => (other === row ? [NaN] : place(...columns.map(({ key }) => other.values[key][0]))));
      const taken = [...labels, ...spots.map(([x, y]) => ({ x: x - 36, y: y + 4 }))];
      const places = [-7, 17, -20, 30, -33, 43, -46, 56].map((shift) => at[1] + shift);
      label.y = places.find((y) => !taken.some((other) => meets(other, y))) ?? places[0];
      labels.push(label);
      make(root, "text", label, row.label);
      const values = columns.map(({ name, digits }, i) => `${name} ${written([a, b][i][0], digits)}`);
      points.push({ at, text: `${row.label}: ${values.join("; ")}`, color });
    }
    explore(figure.querySelector(".plot"), root, points);
  };
  const select = (name, text, options, value, onchange) => {
    const element = makeHtml(makeHtml(controls, "label", {}, `${text} `), "select");
    options.forEach((option) => makeHtml(element, "option", { value: option.key }, option.name));
    element.value = value;
    element.addEventListener("change", () => { onchange(element.value); draw(); });
    selects[name] = element;
  };
  const fill = () => {
    const [first, second] = size.columns.map(({ key }) => key);
    for (const [name, other] of [["across", second], ["up", first]]) {
      const kept = selects[name]?.value;
      selects[name]?.parentElement.remove();
      select(name, name, size.columns, size.columns.some(({ key }) => key === kept) ? kept : other, () => {});
    }
  };
  select("size", "size", sizes.map(({ title }) => ({ key: title, name: title })), size.title, (title) => {
    size = sizes.find((other) => other.title === title);
    fill();
  });
  fill();
  new ResizeObserver(draw).observe(figure);
}

let COURSE = []; // the stages in order: each one's colour
for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  COURSE = data.course;
  figure.hidden = false;
  ({ lossCurves, costPoints })[figure.dataset.chart](figure, data.content);
}
