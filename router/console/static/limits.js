// The limits of a key or an account: read from the page's form, filled into it, and in words.

import { all, find, make, say } from "./dom.js";
import { count } from "./format.js";

const NAMES = {
  requests_per_minute: (value) => `${count(value)} requests/min`,
  tokens_per_minute: (value) => `${count(value)} tokens/min`,
  dollars_per_month: (value) => `$${value}/month`,
  concurrent_requests: (value) => `${count(value)} at once`,
};

/** The limits that a group of inputs has. Money stays a text, to the last digit. */
function readGroup(group) {
  const limits = {};
  for (const input of all("[data-limit]", group)) {
    const value = input.value.trim();
    if (value !== "") limits[input.dataset.limit] = input.dataset.limit === "dollars_per_month" ? value : Number(value);
  }
  return limits;
}

function fillGroup(group, limits = {}) {
  for (const input of all("[data-limit]", group)) input.value = limits[input.dataset.limit] ?? "";
}

/** Each limit in words, those of single models after it. */
function inWords({ overall = {}, models = {} } = {}) {
  const words = (limits) =>
    Object.entries(NAMES)
      .filter(([name]) => limits[name] !== null && limits[name] !== undefined)
      .map(([name, word]) => word(limits[name]));
  return [...words(overall), ...Object.entries(models).flatMap(([model, limits]) => words(limits).map((word) => `${model}: ${word}`))];
}

/** A group of inputs for one model, with ids of its own. */
function modelLimits(model, limits) {
  const group = find("#limits-template").content.cloneNode(true).firstElementChild;
  group.dataset.model = model;
  find("legend", group).textContent = `Limits for ${model}`;
  for (const input of all("[data-limit]", group)) {
    const id = `${input.id}-${modelLimits.made}`;
    find(`label[for="${input.id}"]`, group).htmlFor = id;
    input.id = id;
  }
  modelLimits.made += 1;
  fillGroup(group, limits);
  find("[data-remove]", group).addEventListener("click", () => {
    group.remove();
    find("#limit-model").focus();
  });
  return group;
}
modelLimits.made = 0;

/** What the form says. A model without any limit is left out. */
export function readLimits() {
  const groups = all("[data-model]", find("#limits-models")).map((group) => [group.dataset.model, readGroup(group)]);
  const models = Object.fromEntries(groups.filter(([, limits]) => Object.keys(limits).length));
  return { overall: readGroup(find("#limits-overall")), models };
}

export function fillLimits({ overall, models = {} } = {}) {
  fillGroup(find("#limits-overall"), overall);
  find("#limits-models").replaceChildren(...Object.entries(models).map(([model, limits]) => modelLimits(model, limits)));
}

find("#limit-model")?.addEventListener("change", (event) => {
  const model = event.target.value;
  event.target.value = "";
  const groups = all("[data-model]", find("#limits-models"));
  if (!model || groups.some((group) => group.dataset.model === model)) return;
  const group = modelLimits(model);
  find("#limits-models").append(group);
  find("input", group).focus();
});

// ---- shown ----

export const lines = (texts) => make("ul", { class: "plain-list" }, ...texts.map((text) => make("li", {}, text)));

/** What a cell of a table has of limits. */
export function shownLimits(limits) {
  const words = inWords(limits);
  return words.length ? lines(words) : "none";
}

/** Say what all keys of who is logged in may use together, where that is bounded. */
export function sayTogether() {
  const element = find("#together");
  const words = inWords(JSON.parse(element.dataset.limits));
  say(element, words.length ? `All your keys together: ${words.join(", ")}` : "");
}
