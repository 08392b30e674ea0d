// "Try it": a trained model continues a text, and shows the attention and experts behind each character.
"use strict";

const place = document.getElementById("try"), form = place.querySelector("form");
const [text, panel, status] = [".text", ".panel", ".status"].map((name) => place.querySelector(name));
const models = {}; // by stage, once loaded
let shown = DATA.recorded; // {characters, steps}: what each character's token computed

/** The model of a stage. Its weights are a script, because a page from a disk may not fetch. */
async function load(stage) {
  if (!models[stage]) {
    status.textContent = "Loading the weights …";
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      [script.src, script.onload, script.onerror] = [`static/${stage}.js`, resolve, reject];
      document.head.append(script);
    });
    models[stage] = new Model(DATA[stage]);
  }
  return models[stage];
}

/** Draws a token from softmax(logits / temperature); at temperature 0 it is the likeliest. */
function draw(logits, temperature) {
  if (!temperature) return logits.indexOf(Math.max(...logits));
  let left = Math.random();
  const probabilities = softmax(logits.map((logit) => logit / temperature));
  return Math.max(0, probabilities.findIndex((probability) => (left -= probability) < 0));
}

/** Continues the text with the chosen model. */
async function write() {
  const { stage, prompt, temperature, length } = Object.fromEntries(new FormData(form));
  const model = await load(stage).catch(() => null), given = Array.from(prompt);
  if (!model) return (status.textContent = `static/${stage}.js could not be loaded.`);
  const unknown = given.find((character) => !model.characters.includes(character));
  if (unknown) return (status.textContent = `The model does not know “${unknown}”.`);
  if (!given.length) return (status.textContent = "Type the beginning of a text.");
  status.textContent = "Writing …";
  model.reset();
  const started = performance.now(), characters = [...given], steps = [];
  for (let i = 0; i < given.length + Number(length); i++) {
    steps.push(model.step(model.characters.indexOf(characters[i])));
    if (i + 1 >= given.length) characters.push(model.characters[draw(steps[i].logits, Number(temperature))]);
    if (i % 20 === 0) await new Promise((resolve) => setTimeout(resolve)); // lets the page draw
  }
  const seconds = (performance.now() - started) / 1000;
  status.textContent = `${steps.length} characters at ${Math.round(steps.length / seconds)} a second. Click one.`;
  shown = { characters: characters.slice(0, steps.length), steps };
  list(given.length - 1);
}

/** A readable name of a character. */
function named(character) {
  return { " ": "space", "\n": "new line" }[character] ?? character;
}

function percent(share) {
  return `${Math.round(100 * share)}%`;
}

/** The text as buttons, of which the arrow keys choose one. A line may end after a word, not within it. */
function list(chosen) {
  text.replaceChildren();
  let word = makeHtml(text, "span");
  shown.characters.forEach((character, i) => {
    const looks = { " ": "\u00a0", "\n": "↵" }[character] ?? character;
    const button = makeHtml(word, "button", { type: "button", "aria-label": named(character) }, looks);
    button.addEventListener("click", () => choose(i));
    if (character === "\n") text.append("\n");
    if (" \n".includes(character)) word = makeHtml(text, "span");
  });
  choose(chosen);
}

text.addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key], buttons = [...text.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + move];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.click();
});

/** Shows what one character's token attended to, and the experts that computed it. */
function choose(index) {
  text.querySelectorAll("button").forEach((button, i) => {
    button.tabIndex = i === index ? 0 : -1;
    button.setAttribute("aria-pressed", i === index);
  });
  const { attention, experts } = shown.steps[index];
  panel.replaceChildren();
  attention.forEach((heads, layer) => {
    const table = makeHtml(panel, "table");
    const chosen = experts[layer]?.map(([expert, weight]) => `${expert} (${percent(weight)})`);
    makeHtml(table, "caption", {}, `Layer ${layer + 1}` + (chosen ? `: experts ${chosen.join(" and ")}` : ""));
    heads.forEach((weights, head) => {
      const row = makeHtml(table, "tr"), first = index + 1 - weights.length; // of the window
      makeHtml(row, "th", { scope: "row" }, `head ${head + 1}`);
      const strip = makeHtml(makeHtml(row, "td"), "div", { class: "strip", "aria-hidden": true });
      weights.forEach((weight, t) => {
        const character = shown.characters[first + t].replace("\n", "↵");
        makeHtml(strip, "span", { style: `--weight:${weight}` }, character);
      });
      const looked = [...weights.keys()].filter((t) => weights[t] >= 0.01);
      const best = looked.sort((a, b) => weights[b] - weights[a]).slice(0, 3);
      const strongest = best.map((t) => `${named(shown.characters[first + t])} ${percent(weights[t])}`);
      makeHtml(row, "td", { class: "strongest" }, strongest.join(", "));
    });
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true; // a second text at the same time would use the same cache
  write().finally(() => (button.disabled = false));
});
place.hidden = false;
list(shown.characters.length - 1);
