// The API reference: a form for a request, the same as a program, and its answer.

import { api } from "./api.js";
import { complete, whyNot } from "./completions.js";
import { all, copy, find, make } from "./dom.js";
import { addMessage, addText, fill, limitTexts, read, renumber } from "./fields.js";
import { count, duration, moment, speed } from "./format.js";
import { toJson } from "./json.js";
import { coloured, hint, sample } from "./samples.js";
import { tabs } from "./tabs.js";

const page = find("#reference");
const form = find("#request");
const path = page.dataset.path;
const examples = JSON.parse(page.dataset.examples);
const answers = JSON.parse(page.dataset.answers);
const beyond = new Set(all("[data-beyond-sdk]", form).map((field) => field.dataset.parameter));
const show = tabs(find("#views"));
const view = find("#view-text");
const progress = find("#progress");
/** What stops the request that is being answered. */
let running = null;

// ---- the form ----

function changed() {
  const { body } = read(form);
  const language = find("#language").value;
  const request = { path, body, provider: find("#provider-key").value !== "", origin: location.origin, beyond };
  find("#sample").replaceChildren(...coloured(sample(language, request), language));
  find("#sample-hint").textContent = hint(language, request);
}

form.addEventListener("input", changed);
form.addEventListener("change", (event) => {
  if (event.target.matches("[data-role]")) renumber(event.target.closest(".field"));
  changed();
});
form.addEventListener("click", (event) => {
  const field = event.target.closest(".field");
  if (event.target.closest("[data-add]")) {
    if (field.dataset.widget === "messages") find("[data-content]", addMessage(field)).focus();
    else addText(field).focus();
  } else if (event.target.closest("[data-remove]")) {
    event.target.closest(".message, .text-row").remove();
    if (field.dataset.widget === "messages") renumber(field);
    else limitTexts(field);
    find("[data-add]", field).focus();
  } else return;
  changed();
});
find("#example-request").addEventListener("change", (event) => {
  if (event.target.value === "") return;
  fill(form, { ...examples[event.target.value][1], model: find("#p-model").value });
  changed();
});
find("#language").addEventListener("change", (event) => {
  try {
    localStorage.setItem("trunkline-language", event.target.value);
  } catch {
    // It is asked again the next time.
  }
  changed();
});
find("#copy-sample").addEventListener("click", async (event) => {
  if (await copy(find("#sample"), progress)) event.target.textContent = "Copied";
  setTimeout(() => (event.target.textContent = "Copy"), 2000);
});

// ---- the answer ----

function figures(answer) {
  find("#figures").hidden = false;
  const status = find("#figure-status");
  status.textContent = answer.status || "–";
  find("#figure-first").textContent = duration(answer.first);
  find("#figure-total").textContent = answer.status || answer.endedAt ? duration(answer.total) : "–";
  const about = answer.usage ? "" : "≈ ";
  find("#figure-speed").textContent = answer.tokensPerSecond ? about + speed(answer.tokensPerSecond) : "–";
  find("#figure-tokens").textContent = answer.usage
    ? `${count(answer.usage.prompt_tokens)} + ${count(answer.usage.completion_tokens)}`
    : answer.pieces ? `≈ ${count(answer.pieces)}` : "–";
  find("#figure-tokens").title = answer.usage ? "of the prompt + generated" : "pieces that came: without its usage an answer tells no more";
}

/** Brings the text view up to date; what is there already stays. */
function texts(answer) {
  answer.choices.forEach((choice, place) => {
    let element = view.children[place];
    if (!element) {
      element = make(
        "div",
        { class: "choice" },
        make("p", { class: "choice-name" }, `Choice ${place}`),
        make("div", { class: "reasoning" }),
        make("span", { class: "choice-text" }),
        make("pre", { class: "calls" }),
        make("p", { class: "choice-name" }),
      );
      view.append(element);
    }
    const [name, reasoning, text, calls, finish] = element.children;
    name.hidden = answer.choices.length < 2;
    reasoning.hidden = !choice.reasoning;
    grow(reasoning, choice.reasoning);
    grow(text, choice.text);
    calls.hidden = !choice.calls.length;
    calls.textContent = choice.calls.length ? choice.calls.map((call) => `${call.name}(${call.arguments})`).join("\n") : "";
    finish.textContent = choice.finish ? `finish_reason: ${choice.finish}` : "";
    finish.hidden = !choice.finish;
  });
  if (answer.error && !find(".problem", view)) {
    view.append(make("p", { class: "problem" }, answer.error.message ?? "an error"));
  }
}

/** Adds what is new of a text, so that a reader's selection stays. */
function grow(element, text) {
  const shown = element.textContent.length;
  if (text.length > shown) element.append(text.slice(shown));
}

let latest = null;
let scheduled = false;
let shownRaw = 0;

/** Shows an answer at the next frame: many pieces of it may come until then. */
function news(answer) {
  latest = answer;
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    if (latest) draw(latest);
  });
}

function draw(answer) {
  figures(answer);
  texts(answer);
  const raw = find("#raw");
  if (answer.raw.length > shownRaw) {
    raw.append(answer.raw.slice(shownRaw));
    shownRaw = answer.raw.length;
  }
  find("#response-headers").textContent = answer.headers.map(([name, value]) => `${name}: ${value}`).join("\n");
}

function clear() {
  latest = null;
  view.replaceChildren();
  find("#raw").textContent = "";
  find("#response-headers").textContent = "";
  find("#example-answer").value = "";
  shownRaw = 0;
}

function busy(on) {
  find("#try").disabled = on;
  find("#stop").disabled = !on;
  view.setAttribute("aria-busy", String(on));
}

async function send() {
  const { body, wrong } = read(form);
  if (wrong.length) {
    progress.textContent = "Some fields cannot be sent as they are.";
    const more = wrong[0].closest("details");
    if (more) more.open = true;
    find("input, select, textarea", wrong[0]).focus();
    return;
  }
  running = new AbortController();
  clear();
  busy(true);
  progress.textContent = "Sending…";
  // On a narrow page the answer is far below the button, on a low one at the end of its column.
  find("#response").scrollIntoView({ block: getComputedStyle(find(".actions")).position === "fixed" ? "start" : "nearest" });
  const request = {
    path,
    body: toJson(body),
    bearer: find("#bearer").value.trim(),
    providerKey: find("#provider-key").value.trim(),
    signal: running.signal,
  };
  try {
    const answer = await complete(request, (now) => {
      if (now.status && !now.endedAt) progress.textContent = now.streamed ? "Streaming…" : "Reading…";
      news(now);
    });
    progress.textContent = ended(answer);
  } catch (error) {
    progress.textContent = whyNot(error);
    if (!view.childElementCount) view.append(make("p", { class: "problem" }, whyNot(error)));
  }
  running = null;
  busy(false);
  await recent();
}

function ended(answer) {
  if (answer.error) return `${answer.status}: it failed after ${duration(answer.total)}.`;
  const tokens = answer.usage ? `${count(answer.usage.completion_tokens)} tokens` : "complete";
  return `${answer.status}: ${tokens} in ${duration(answer.total)}.`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) send();
});
find("#stop").addEventListener("click", () => running?.abort());
find("#example-answer").addEventListener("change", (event) => {
  if (event.target.value === "" || running) return;
  const chosen = answers[event.target.value];
  clear();
  event.target.value = String(answers.indexOf(chosen));
  find("#figures").hidden = true;
  find("#raw").textContent = chosen.text;
  find("#response-headers").textContent = `content-type: ${chosen.media}`;
  view.append(make("p", { class: "quiet" }, "An example; it is in the raw view."));
  progress.textContent = `Example of ${chosen.status}, ${chosen.media}.`;
  show("tab-raw");
});

// ---- the last requests ----

async function recent() {
  const rows = find("#recent tbody");
  const cell = (...content) => make("td", {}, ...content);
  try {
    const { data } = await api("GET", "/api/requests?limit=4");
    rows.replaceChildren(
      ...data.map((row) =>
        make(
          "tr",
          {},
          cell(make("a", { href: `/requests/${encodeURIComponent(row.id)}` }, moment(row.began))),
          cell(make("span", { class: `badge outcome-${row.outcome}` }, row.outcome === "open" ? "open" : row.status)),
          make("td", { class: "rest" }, make("span", { class: "clip", title: row.user_agent }, row.user_agent || "–")),
        ),
      ),
    );
    if (!data.length) rows.append(make("tr", {}, make("td", { colspan: 3, class: "quiet" }, "No requests yet. Try It!")));
  } catch {
    rows.replaceChildren(make("tr", {}, make("td", { colspan: 3, class: "quiet" }, "They cannot be retrieved now.")));
  }
}

// ---- the beginning ----

const asked = new URLSearchParams(location.search).get("model");
const model = find("#p-model");
if (asked && model.options && [...model.options].some((option) => option.value === asked)) model.value = asked;
const first = examples.find(([, body]) => body.stream) ?? examples[0];
fill(form, { ...first[1], model: model.value });
try {
  const language = localStorage.getItem("trunkline-language");
  if (all("option", find("#language")).some((option) => option.value === language)) find("#language").value = language;
} catch {
  // The first one.
}
changed();
recent();
