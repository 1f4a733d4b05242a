// All that is kept of one request.

import { api, reason } from "./api.js";
import { find, make, say } from "./dom.js";
import { count, duration, exactMoney, moment, nano, speed } from "./format.js";

const page = find("#request");
const state = find("#state");

function facts(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("dl", { class: "facts" }, ...known.map(([name, value, wide]) => make("div", { class: wide ? "wide" : null }, make("dt", {}, name), make("dd", {}, value))));
}

function card(title, ...content) {
  return make("section", { class: "card" }, make("h2", {}, title), ...content);
}

function code(text) {
  return make("code", {}, text);
}

function link(name, value, text) {
  return make("a", { href: `/requests?${new URLSearchParams({ [name]: value })}` }, text);
}

function show(row) {
  const badge = make("span", { class: `badge outcome-${row.outcome}` }, row.outcome);
  const open = row.outcome === "open";
  const parts = [
    card(
      "What came of it",
      facts([
        ["Outcome", badge],
        ["Status", open ? null : String(row.status)],
        ["Error", row.error],
        ["Began", moment(row.began)],
        ["TTFT", duration(row.first_ms)],
        ["Duration", open ? null : duration(row.duration_ms)],
        ["Tokens per second", row.tokens_per_second ? speed(row.tokens_per_second) : null],
      ]),
    ),
    card(
      "What was used",
      facts([
        ["Prompt tokens", open ? null : count(row.prompt_tokens)],
        ["Completion tokens", open ? null : count(row.completion_tokens)],
        ["Tokens in all", open ? null : count(row.prompt_tokens + row.completion_tokens)],
        ["Price", exactMoney(nano(row.price))],
      ]),
    ),
    card(
      "Who asked, and how",
      facts([
        ["Model", row.model ? link("model", row.model, row.model) : null, true],
        ["Path", code(row.path), true],
        ["Streamed", row.stream ? "yes" : "no"],
        ["Account", row.account],
        ["Key", row.key ? link("key_id", row.key_id, row.key) : null],
        ["User agent", row.user_agent || "–", true],
        ["x-request-id", code(row.request_id), true],
        ["Replica", row.replica ? code(row.replica) : null, true],
        ["Router", row.router ? code(row.router) : null, true],
      ]),
    ),
  ];
  if (row.asked !== undefined && row.asked !== null) parts.push(card("What was asked", make("pre", { class: "code-block", tabindex: "0" }, pretty(row.asked))));
  if (row.answered !== undefined && row.answered !== null) parts.push(card("What was answered", make("pre", { class: "code-block", tabindex: "0" }, row.answered)));
  page.replaceChildren(make("div", { class: "request-grid" }, ...parts));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function load() {
  try {
    const row = await api("GET", `/api/requests/${encodeURIComponent(page.dataset.id)}`);
    show(row);
    if (row.outcome === "open") setTimeout(load, 2000);
  } catch (error) {
    if (state.isConnected) say(state, error.status === 404 ? "There is no such request, or it is another account's." : reason(error), true);
  }
  page.setAttribute("aria-busy", "false");
}

load();
