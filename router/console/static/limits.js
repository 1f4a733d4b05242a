// The limits of a key: read from a form, filled into it, and in words.

import { all, find } from "./dom.js";
import { count } from "./format.js";

const NAMES = {
  requests_per_minute: (value) => `${count(value)} requests/min`,
  tokens_per_minute: (value) => `${count(value)} tokens/min`,
  dollars_per_month: (value) => `$${value}/month`,
  concurrent_requests: (value) => `${count(value)} at once`,
};

/** The limits that a group of inputs has. Money stays a text, to the last digit. */
export function readLimits(group) {
  const limits = {};
  for (const input of all("[data-limit]", group)) {
    const value = input.value.trim();
    if (value !== "") limits[input.dataset.limit] = input.dataset.limit === "dollars_per_month" ? value : Number(value);
  }
  return limits;
}

export function fillLimits(group, limits = {}) {
  for (const input of all("[data-limit]", group)) input.value = limits[input.dataset.limit] ?? "";
}

/** Each limit in words, those of single models after it. */
export function inWords({ overall = {}, models = {} } = {}) {
  const words = (limits) =>
    Object.entries(NAMES)
      .filter(([name]) => limits[name] !== null && limits[name] !== undefined)
      .map(([name, word]) => word(limits[name]));
  return [...words(overall), ...Object.entries(models).flatMap(([model, limits]) => words(limits).map((word) => `${model}: ${word}`))];
}

/** A group of inputs for one model, with ids of its own. */
export function modelLimits(model, limits = {}) {
  const group = find("#limits-template").content.cloneNode(true).firstElementChild;
  group.dataset.model = model;
  find("legend", group).textContent = `Limits for ${model}`;
  for (const input of all("[data-limit]", group)) {
    const id = `${input.id}-${modelLimits.made}`;
    find(`label[for="${input.id}"]`, group).htmlFor = id;
    input.id = id;
  }
  modelLimits.made += 1;
  fillLimits(group, limits);
  find("[data-remove]", group).addEventListener("click", () => {
    group.remove();
    find("#limit-model").focus();
  });
  return group;
}
modelLimits.made = 0;
