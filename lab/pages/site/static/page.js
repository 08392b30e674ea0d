// What every page has: the theme, explanations of terms, the search, keys for the next page, and tabs.
"use strict";

const root = document.documentElement, top_ = root.dataset.root; // from this page to the top of the site

// ---- The theme: the reader's own choice, else the browser's.

function useTheme(theme) {
  root.dataset.theme = theme;
  for (const source of document.querySelectorAll("picture source")) {
    source.media = theme === "dark" ? "all" : "not all"; // figures have a file for each theme
  }
}

const button = document.querySelector(".theme");
const browsers = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
if (root.dataset.theme) useTheme(root.dataset.theme);
button.hidden = false;
button.addEventListener("click", () => {
  useTheme((root.dataset.theme ?? browsers) === "dark" ? "light" : "dark");
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {} // storage may be switched off
});

// ---- Explanations of terms, under the mouse or the focus. Escape closes them.

const tip = document.createElement("div");
tip.id = "explanation";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

function explainTerm(link) {
  tip.hidden = !link;
  document.querySelector("[aria-describedby=explanation]")?.removeAttribute("aria-describedby");
  if (!link) return;
  tip.textContent = link.dataset.tip;
  link.setAttribute("aria-describedby", tip.id);
  const box = link.getBoundingClientRect(), left = Math.min(box.left, innerWidth - tip.offsetWidth - 12);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${box.bottom + scrollY}px`;
}

document.addEventListener("mouseover", (event) => {
  if (!tip.contains(event.target)) explainTerm(event.target.closest(".term"));
});
document.addEventListener("focusin", (event) => explainTerm(event.target.closest(".term")));

// ---- Keys.

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") explainTerm(null);
  const plain = !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey);
  const busy = event.defaultPrevented || event.target.closest("input, select, textarea, button, [tabindex]");
  const link = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (plain && !busy && link) document.querySelector(`.around a[rel=${link}]`)?.click();
});

// ---- The search. Its index is a script, loaded when it is first needed.

const field = document.querySelector(".search input"), results = document.querySelector(".search ol");
document.querySelector(".search").hidden = false;
field.addEventListener("focus", () => {
  if (window.DATA?.search) return;
  const script = document.createElement("script");
  script.src = `${top_}static/search.js`;
  script.onload = search;
  document.head.append(script);
}, { once: true });

/** Lists the sections that contain all words, a few of each page; words in the heading count most. */
function search() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  results.replaceChildren();
  results.hidden = !words.length || !window.DATA?.search;
  if (results.hidden) return;
  const found = [];
  for (const [page, address, heading, body] of DATA.search) {
    const title = `${heading} ${page}`.toLowerCase(), all = `${title} ${body.toLowerCase()}`;
    if (words.every((word) => all.includes(word))) {
      const weight = (word) => (heading.toLowerCase().includes(word) ? 2 : title.includes(word) ? 1 : 0);
      const rank = words.reduce((sum, word) => sum + weight(word), 0);
      found.push({ page, address, heading, body, rank });
    }
  }
  found.sort((a, b) => b.rank - a.rank);
  const ofPage = {}, few = ({ page }) => (ofPage[page] = (ofPage[page] ?? 0) + 1) <= 3;
  const listed = found.filter(few).slice(0, 12);
  for (const { page, address, heading, body } of listed) {
    const item = document.createElement("li"), link = document.createElement("a");
    const near = body.toLowerCase().indexOf(words[0]), at = body.lastIndexOf(" ", Math.max(0, near - 40)) + 1;
    link.href = top_ + address;
    link.textContent = heading === page ? page : `${page}: ${heading}`;
    item.append(link, document.createElement("br"), body.slice(at, body.lastIndexOf(" ", at + 120)), " …");
    results.append(item);
  }
  if (found.length > listed.length) results.append(`and ${found.length - listed.length} more sections`);
  if (!found.length) results.append("Nothing found.");
}

field.addEventListener("input", search);
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter") results.querySelector("a")?.click();
  if (event.key === "Escape") [field.value, results.hidden] = ["", true];
});
document.addEventListener("click", ({ target }) => (target === field ? search() : (results.hidden = true)));

// ---- The stations of the first page: tabs with a panel each. The charts hear of the choice.

const stations = document.querySelector(".stations");
if (stations) {
  const tabs = [...stations.querySelectorAll("a")];
  const panels = tabs.map((tab) => document.querySelector(tab.hash));
  const choose = (index) => tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", i === index);
    tab.tabIndex = i === index ? 0 : -1;
    panels[i].hidden = i !== index;
    if (i === index) document.dispatchEvent(new CustomEvent("stage", { detail: panels[i].id }));
  });
  stations.setAttribute("role", "tablist");
  tabs.forEach((tab, i) => {
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panels[i].id);
    panels[i].setAttribute("role", "tabpanel");
    panels[i].setAttribute("aria-label", tab.textContent.trim());
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", tab.hash);
      choose(i);
    });
    tab.addEventListener("keydown", (event) => {
      const next = tabs[i + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? NaN)];
      if (!next) return;
      next.focus();
      next.click();
    });
  });
  choose(Math.max(0, tabs.findIndex((tab) => tab.hash === location.hash)));
}
