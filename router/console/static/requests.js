// Recent requests: filtered by the address, page by page, the first page as it grows.

import { api, reason } from "./api.js";
import { all, find, make, poll, say } from "./dom.js";
import { count, duration, localInput, moment, nano, exactMoney, money } from "./format.js";

const list = find("#list");
const rows = find("#rows");
const state = find("#state");
const form = find("#filters");
const live = find("#live");
const admin = JSON.parse(rows.dataset.admin);
const NAMES = ["model", "outcome", "account_id", "key_id", "since", "until", "status"];
const SIZE = 50;
let stop = () => {};
let asked = 0;

const address = () => new URLSearchParams(location.search);

// ---- rows ----

function cell(label, attributes, ...content) {
  return make("td", { "data-label": label, ...attributes }, ...content.filter((part) => part !== null));
}

function cells(row) {
  const tokens = row.outcome === "open" ? "–" : `${count(row.prompt_tokens)} + ${count(row.completion_tokens)}`;
  const status = row.outcome === "open" ? "open" : row.status;
  const price = nano(row.price);
  return [
    make("th", { scope: "row", class: "nowrap" }, make("a", { href: `/requests/${encodeURIComponent(row.id)}` }, moment(row.began))),
    cell("Status", {}, make("span", { class: `badge outcome-${row.outcome}`, title: row.error || row.outcome }, `${status}`), outcome(row)),
    cell("Model", { class: "wide" }, make("span", { class: "clip", title: row.model }, row.model || "–")),
    cell("Key", { class: "span" }, make("span", { class: "key-name", title: row.key }, row.key || "–"), admin ? make("span", { class: "quiet second" }, row.account) : null),
    cell("Tokens", { class: "number", title: "of the prompt + generated" }, tokens),
    cell("TTFT", { class: "number" }, duration(row.first_ms)),
    cell("Price", { class: "number", title: exactMoney(price) }, money(price)),
    cell("User agent", { class: "wide rest" }, make("span", { class: "clip", title: row.user_agent }, row.user_agent || "–")),
  ];
}

function outcome(row) {
  return ["completed", "open"].includes(row.outcome) ? null : make("span", { class: "quiet second" }, row.error || row.outcome);
}

/** Brings the table up to date; rows that are there already stay, so that a reader keeps the place. */
function show(data, fresh) {
  const known = new Map(all("tr", rows).map((element) => [element.dataset.id, element]));
  let before = null;
  for (const row of data) {
    const text = JSON.stringify(row);
    let element = known.get(row.id);
    known.delete(row.id);
    if (!element) {
      element = make("tr", { "data-id": row.id, class: fresh ? "link fresh" : "link" });
    }
    if (element.dataset.text !== text) {
      const focused = element.contains(document.activeElement);
      element.replaceChildren(...cells(row));
      element.dataset.text = text;
      if (focused) find("a", element).focus();
    }
    const place = before ? before.nextSibling : rows.firstChild;
    if (place !== element) rows.insertBefore(element, place);
    before = element;
  }
  for (const element of known.values()) element.remove();
}

rows.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (!row || event.target.closest("a") || String(getSelection())) return;
  find("a", row).click();
});

// ---- asking ----

function query() {
  const from = address();
  const to = new URLSearchParams({ limit: SIZE });
  for (const name of [...NAMES, "before"]) if (from.get(name)) to.set(name, from.get(name));
  return to;
}

async function load(fresh) {
  const turn = (asked += 1);
  try {
    const { data, next } = await api("GET", `/api/requests?${query()}`);
    if (turn !== asked) return;
    show(data, fresh);
    say(state, data.length ? "" : empty());
    find("#freshness").textContent = `As of ${new Date().toLocaleTimeString("en-GB")}`;
    pages(next);
  } catch (error) {
    if (turn !== asked) return;
    if (rows.childElementCount) find("#freshness").textContent = `${reason(error)} It is tried again.`;
    else failed(error);
  }
  list.setAttribute("aria-busy", "false");
}

function empty() {
  return NAMES.some((name) => address().get(name)) ? "No request is like that." : "No requests yet. They appear here as they come.";
}

function failed(error) {
  say(state, reason(error), true);
  const again = make("button", { type: "button", class: "small" }, "Try again");
  again.addEventListener("click", start);
  state.append(again);
}

function pages(next) {
  const here = address();
  const link = (element, before) => {
    const to = new URLSearchParams(here);
    if (before) to.set("before", before);
    else to.delete("before");
    element.href = `/requests${to.size ? `?${to}` : ""}`;
  };
  const first = !here.get("before");
  find("#newest").hidden = first;
  find("#older").hidden = !next;
  link(find("#newest"), null);
  if (next) link(find("#older"), next);
  live.hidden = !first;
}

function start() {
  stop();
  const first = !address().get("before");
  const on = first && live.getAttribute("aria-pressed") === "true";
  if (on) {
    let begun = false;
    stop = poll(async () => {
      await load(begun);
      begun = true;
    }, 2000);
  } else {
    stop = () => {};
    load(false);
  }
}

live.addEventListener("click", () => {
  const on = live.getAttribute("aria-pressed") !== "true";
  live.setAttribute("aria-pressed", String(on));
  live.textContent = on ? "Live" : "Paused";
  start();
});

// ---- filters ----

/** Shows in the form what the address says. */
function fill() {
  const here = address();
  for (const name of NAMES) {
    const input = form.elements[name];
    if (!input) continue;
    const value = here.get(name) ?? "";
    if (input.type === "datetime-local") input.value = value ? localInput(value) : "";
    else {
      // A model that is gone, or a key whose name has not come yet, is a choice all the same.
      if (value && ![...input.options].some((option) => option.value === value)) input.append(make("option", { value }, value));
      input.value = value;
    }
  }
  const csv = new URLSearchParams(here);
  csv.delete("before");
  csv.set("format", "csv");
  find("#export-csv").href = `/api/export?${csv}`;
  csv.set("format", "json");
  find("#export-json").href = `/api/export?${csv}`;
}

function go(to) {
  history.pushState(null, "", `/requests${to.size ? `?${to}` : ""}`);
  arrive();
}

function arrive() {
  fill();
  rows.replaceChildren();
  list.setAttribute("aria-busy", "true");
  say(state, "Retrieving recent requests…");
  start();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const to = new URLSearchParams();
  for (const name of NAMES) {
    const value = form.elements[name]?.value;
    if (value) to.set(name, form.elements[name].type === "datetime-local" ? new Date(value).toISOString() : value);
  }
  go(to);
});
form.addEventListener("change", (event) => {
  if (event.target.matches("select")) form.requestSubmit();
});
form.addEventListener("reset", (event) => {
  event.preventDefault();
  go(new URLSearchParams());
});
addEventListener("popstate", arrive);

/** The names of keys and accounts, for their filters. */
async function names() {
  try {
    const { data: keys } = await api("GET", "/api/keys");
    const label = (key) => `${key.name}${admin ? ` (${key.account})` : ""}${key.revoked ? ", revoked" : ""}`;
    options(form.elements.key_id, keys.map((key) => [key.id, label(key)]));
    if (admin) {
      const { data: people } = await api("GET", "/api/accounts");
      options(form.elements.account_id, people.map((one) => [one.id, one.name]));
    }
  } catch {
    // Without names there is less to choose from.
  }
}

function options(select, entries) {
  const chosen = select.value;
  const first = select.options[0];
  select.replaceChildren(first, ...entries.map(([value, text]) => make("option", { value }, text)));
  if (chosen && select.value !== chosen) {
    if (![...select.options].some((option) => option.value === chosen)) select.append(make("option", { value: chosen }, chosen));
    select.value = chosen;
  }
}

arrive();
names();
