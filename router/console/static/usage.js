// What was used: by day, model and key; and how fast it goes now.

import { api, reason } from "./api.js";
import { all, find, make, poll, say } from "./dom.js";
import { compact, count, exactMoney, money, nano, shortDay, speed, utcDay } from "./format.js";
import { byDay, byName, COLOURS, spark } from "./plot.js";

const form = find("#filters");
const usage = find("#usage");
const state = find("#state");
const DAY = 86_400_000;
const MOST_DAYS = 366;
const FILTERS = ["model", "account_id", "key_id"];
let known = null;
let asked = 0;

// ---- measures: what a sum of rows is, and how it is written ----

const tokens = (sum) => sum.prompt + sum.completion;
const MEASURES = {
  tokens: { name: "Tokens", of: (sum) => tokens(sum), shown: compact, exact: (sum) => count(tokens(sum)) },
  requests: { name: "Requests", of: (sum) => sum.requests, shown: compact, exact: (sum) => count(sum.requests) },
  price: { name: "Cost", of: (sum) => Number(sum.price) / 1e9, shown: (dollars) => money(BigInt(Math.round(dollars * 1e9))), exact: (sum) => exactMoney(sum.price) },
};

const nothing = () => ({ requests: 0, prompt: 0, completion: 0, price: 0n });

function add(sum, row) {
  sum.requests += row.requests;
  sum.prompt += row.prompt_tokens;
  sum.completion += row.completion_tokens;
  sum.price += nano(row.price);
  return sum;
}

const total = (rows) => rows.reduce(add, nothing());

/** Sums by what a row says of itself. */
function grouped(rows, name) {
  const sums = new Map();
  for (const row of rows) {
    const key = name(row);
    if (!sums.has(key)) sums.set(key, nothing());
    add(sums.get(key), row);
  }
  return sums;
}

const chosen = (name) => find(`input[name="${name}"]:checked`).value;
const NAMERS = { model: (row) => row.model || "(none)", key: (row) => row.key_id };

// ---- the range ----

function days() {
  const since = new Date(`${form.elements.since.value}T00:00:00Z`);
  const until = new Date(`${form.elements.until.value}T00:00:00Z`);
  if (Number.isNaN(since.getTime()) || Number.isNaN(until.getTime()) || since > until) return [];
  const length = (until - since) / DAY + 1;
  if (length > MOST_DAYS) {
    form.elements.since.value = utcDay(new Date(until.getTime() - (MOST_DAYS - 1) * DAY));
    return days();
  }
  return Array.from({ length }, (_, place) => utcDay(new Date(since.getTime() + place * DAY)));
}

function setRange(length) {
  const now = new Date();
  form.elements.until.value = utcDay(now);
  form.elements.since.value = utcDay(new Date(now.getTime() - (length - 1) * DAY));
}

// ---- asking ----

async function load() {
  const turn = (asked += 1);
  const range = days();
  if (!range.length) {
    say(state, "The range ends before it begins.", true);
    usage.hidden = true;
    return;
  }
  if (!known) say(state, "Retrieving what was used…");
  const query = (by) => {
    const parameters = new URLSearchParams({ since: range[0], until: range.at(-1), by });
    for (const name of FILTERS) if (form.elements[name]?.value) parameters.set(name, form.elements[name].value);
    return api("GET", `/api/usage?${parameters}`);
  };
  try {
    const [byModel, byKey] = await Promise.all([query("day,model"), query("day,key")]);
    if (turn !== asked) return;
    known = { range, model: byModel.data, key: byKey.data };
    show();
  } catch (error) {
    if (turn !== asked) return;
    usage.hidden = !known;
    say(state, reason(error), true);
  }
}

// ---- showing ----

function keyNames() {
  const names = new Map();
  for (const row of known.key) names.set(row.key_id, row.key || row.key_id.slice(0, 8));
  const taken = new Map();
  for (const name of names.values()) taken.set(name, (taken.get(name) ?? 0) + 1);
  for (const [id, name] of names) if (taken.get(name) > 1) names.set(id, `${name} (${id.slice(0, 6)})`);
  return names;
}

function show() {
  const sum = total(known.model);
  say(state, sum.requests ? "" : "Nothing was used in this range.");
  usage.hidden = !sum.requests;
  if (!sum.requests) return;
  find("#total-tokens").textContent = count(tokens(sum));
  find("#total-split").textContent = `${count(sum.prompt)} of prompts + ${count(sum.completion)} generated`;
  find("#total-requests").textContent = count(sum.requests);
  find("#total-mean").textContent = `${compact(tokens(sum) / sum.requests)} tokens each, on average`;
  find("#total-price").textContent = money(sum.price);
  find("#total-exact").textContent = `exactly ${exactMoney(sum.price)}`;
  const names = keyNames();
  const words = { model: (name) => name, key: (id) => names.get(id) };
  showDays(words);
  showNames("model", words.model);
  showNames("key", words.key);
}

/** Names with the largest first, and those that get no colour of their own together. */
function leading(rows, namer, measure) {
  const every = [...grouped(rows, namer)].sort(([, a], [, b]) => measure.of(b) - measure.of(a));
  const sums = every.filter(([, sum], place) => place === 0 || measure.of(sum) > 0);
  if (sums.length <= COLOURS) return [sums.map(([name]) => name), new Set()];
  const first = sums.slice(0, COLOURS - 1).map(([name]) => name);
  return [first, new Set(sums.slice(COLOURS - 1).map(([name]) => name))];
}

function showDays(words) {
  const split = chosen("split");
  const measure = MEASURES[chosen("measure")];
  const rows = known[split];
  const [names, rest] = leading(rows, NAMERS[split], measure);
  const group = (row) => (rest.has(NAMERS[split](row)) ? "" : NAMERS[split](row));
  const sums = grouped(rows, (row) => `${row.day} ${group(row)}`);
  const at = (day, name) => sums.get(`${day} ${name}`) ?? nothing();
  const series = [...names, ...(rest.size ? [""] : [])].map((name) => {
    const own = known.range.map((day) => at(day, name));
    return { name: name === "" ? `${rest.size} others` : words[split](name), sums: own, values: own.map(measure.of) };
  });
  byDay(find("#by-day"), {
    days: known.range.map((day) => ({ label: shortDay(day), title: day })),
    series,
    title: `${measure.name} by day, split by ${split}`,
    description: `From ${known.range[0]} to ${known.range.at(-1)} it is ${measure.exact(total(rows))} in all. The table that follows has every number.`,
    shown: measure.shown,
    exact: (one, day) => measure.exact(one.sums[day]),
  });
  dayTable(series, measure);
}

const head = (...texts) => make("thead", {}, make("tr", {}, ...texts.map((text, place) => make("th", { scope: "col", class: place ? "number" : null }, text))));
const number = (text) => make("td", { class: "number" }, text);

function dayTable(series, measure) {
  const rows = known.range.map((day, place) => {
    const sum = series.reduce((all, one) => merged(all, one.sums[place]), nothing());
    return make("tr", {}, make("th", { scope: "row", class: "nowrap" }, day), ...series.map((one) => number(measure.exact(one.sums[place]))), number(measure.exact(sum)));
  });
  find("#by-day-table").replaceChildren(
    make("caption", { class: "out-of-sight" }, `${measure.name} by day`),
    head("Day", ...series.map((one) => one.name), "In all"),
    make("tbody", {}, ...rows.reverse()),
  );
}

function merged(a, b) {
  return { requests: a.requests + b.requests, prompt: a.prompt + b.prompt, completion: a.completion + b.completion, price: a.price + b.price };
}

function showNames(split, word) {
  const measure = MEASURES[chosen("measure")];
  const sums = [...grouped(known[split], NAMERS[split])].sort(([, a], [, b]) => measure.of(b) - measure.of(a));
  byName(find(`#by-${split}`), {
    entries: sums.slice(0, COLOURS).map(([name, sum]) => ({ name: word(name), value: measure.of(sum), text: measure.exact(sum) })),
    title: `${measure.name} by ${split}`,
    description: "The table that follows has every number.",
  });
  find(`#by-${split}-table`).replaceChildren(
    make("caption", { class: "out-of-sight" }, `Usage by ${split}`),
    head(split === "model" ? "Model" : "Key", "Requests", "Prompt", "Generated", "Cost"),
    make(
      "tbody",
      {},
      ...sums.map(([name, sum]) =>
        make("tr", {}, make("th", { scope: "row" }, word(name)), number(count(sum.requests)), number(count(sum.prompt)), number(count(sum.completion)), number(exactMoney(sum.price))),
      ),
    ),
  );
}

// ---- the form ----

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", (event) => {
  if (event.target.name === "days" && event.target.value) setRange(Number(event.target.value));
  if (event.target.name === "since" || event.target.name === "until") find('input[name="days"][value=""]').checked = true;
  load();
});
for (const input of all('input[name="measure"], input[name="split"]')) input.addEventListener("change", () => known && show());

async function names() {
  try {
    const { data: keys } = await api("GET", "/api/keys");
    form.elements.key_id.append(...keys.map((key) => make("option", { value: key.id }, `${key.name}${key.revoked ? ", revoked" : ""}`)));
    if (form.elements.account_id) {
      const { data: people } = await api("GET", "/api/accounts");
      form.elements.account_id.append(...people.map((one) => make("option", { value: one.id }, one.name)));
    }
  } catch {
    // Without names there is less to choose from.
  }
}

// ---- now ----

const KEPT = 60;
const speeds = new Map();

async function showSpeed() {
  const box = find("#speed");
  try {
    const { data } = await api("GET", "/api/speed");
    for (const [model, now] of Object.entries(data)) {
      const past = speeds.get(model) ?? [];
      speeds.set(model, [...past, now].slice(-KEPT));
    }
    const cards = Object.entries(data).map(([model, now]) => {
      const past = speeds.get(model);
      return make("div", { class: "speed" }, make("span", { class: "speed-name" }, model), make("span", { class: "speed-figure" }, speed(now)), spark(past, Math.max(...past), KEPT));
    });
    box.replaceChildren(...(cards.length ? cards : [make("p", { class: "quiet" }, "There are no models.")]));
  } catch (error) {
    box.replaceChildren(make("p", { class: "quiet" }, reason(error)));
  }
  box.setAttribute("aria-busy", "false");
}

setRange(7);
load();
names();
poll(showSpeed, 2000);
