// A chat with one model, or with two side by side.

import { complete, whyNot } from "./completions.js";
import { all, find, make } from "./dom.js";
import { count, duration, speed } from "./format.js";
import { Raw, toJson } from "./json.js";

const page = find("#playground");
const columns = find("#columns");
const composer = find("#composer");
const message = find("#message");
const settings = find("#settings");
const models = JSON.parse(page.dataset.models);
const spoken = find("#spoken");

/** One model's side: what was said, and the answer that is coming. */
class Column {
  constructor(model) {
    this.element = find("#column-template").content.cloneNode(true).firstElementChild;
    this.select = find("[data-model]", this.element);
    this.talk = find("[data-talk]", this.element);
    this.figures = find("[data-figures]", this.element);
    this.turns = [];
    this.controller = null;
    if (model) this.select.value = model;
    this.element.setAttribute("aria-label", `Chat ${columns.childElementCount + 1}`);
    this.talk.setAttribute("aria-label", `What was said in chat ${columns.childElementCount + 1}`);
    columns.append(this.element);
  }

  get busy() {
    return this.controller !== null;
  }

  clear() {
    this.controller?.abort();
    this.turns = [];
    this.talk.replaceChildren();
    this.figures.textContent = "";
  }

  /** Says something and takes the answer. */
  async ask(text) {
    this.#add("user", text);
    await this.answer();
  }

  /** The last question again. */
  async retry() {
    while (this.turns.at(-1)?.role === "assistant") this.turns.pop().element.remove();
    if (this.turns.length) await this.answer();
  }

  async answer() {
    const turn = this.#add("assistant", "");
    turn.element.setAttribute("data-busy", "");
    this.controller = new AbortController();
    changed();
    try {
      const body = toJson(request(this.select.value, this.turns.slice(0, -1)));
      const answer = await complete({ path: "/v1/chat/completions", body, signal: this.controller.signal }, (latest) => this.#news(turn, latest));
      this.#show(turn, answer);
      if (answer.error) this.#note(turn, answer.error.message ?? "an error", "problem");
      else if (answer.choices[0]?.finish === "length") this.#note(turn, "It ends here because of the maximum of tokens.", "turn-note");
      spoken.textContent = answer.error ? `${this.select.value} failed.` : `${this.select.value}: ${turn.text}`;
    } catch (error) {
      this.#note(turn, whyNot(error), error.name === "AbortError" ? "turn-note" : "problem");
      spoken.textContent = whyNot(error);
    }
    turn.element.removeAttribute("data-busy");
    this.controller = null;
    changed();
  }

  #add(role, text) {
    const body = make("div", { class: "turn-text" }, text);
    const reasoning = make("div", { class: "reasoning", hidden: true });
    const who = make("p", { class: "turn-who" }, role === "user" ? "You" : this.select.value);
    const element = make("article", { class: `turn ${role}` }, who, reasoning, body);
    const turn = { role, text, element, body, reasoning };
    this.turns.push(turn);
    this.talk.append(element);
    this.talk.scrollTop = this.talk.scrollHeight;
    return turn;
  }

  #news(turn, answer) {
    if (!this.pending) {
      requestAnimationFrame(() => {
        this.#show(turn, this.pending);
        this.pending = null;
      });
    }
    this.pending = answer;
  }

  #show(turn, answer) {
    const atEnd = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 48;
    const choice = answer.choices[0];
    if (choice) {
      if (choice.text.length > turn.text.length) turn.body.append(choice.text.slice(turn.text.length));
      turn.text = choice.text;
      turn.reasoning.textContent = choice.reasoning;
      turn.reasoning.hidden = !choice.reasoning;
    }
    this.figures.textContent = summary(answer);
    if (atEnd) this.talk.scrollTop = this.talk.scrollHeight;
  }

  #note(turn, text, kind) {
    turn.element.append(make("p", { class: kind }, text));
    this.talk.scrollTop = this.talk.scrollHeight;
  }
}

function summary(answer) {
  const parts = [];
  if (answer.first !== null) parts.push(`TTFT ${duration(answer.first)}`);
  if (answer.tokensPerSecond) parts.push(`${answer.usage ? "" : "≈ "}${speed(answer.tokensPerSecond)} tokens/s`);
  if (answer.usage) parts.push(`${count(answer.usage.completion_tokens)} tokens`);
  if (answer.endedAt) parts.push(duration(answer.total));
  return parts.join(" · ");
}

// ---- what is sent ----

function request(model, turns) {
  const body = { model, messages: [], stream: true, stream_options: { include_usage: true } };
  const system = find("#system").value.trim();
  if (system) body.messages.push({ role: "system", content: system });
  // A turn that failed or was stopped before it said anything is none.
  for (const { role, text } of turns) if (text) body.messages.push({ role, content: text });
  for (const input of all('input[type="number"]', settings)) {
    if (input.value === "" || input.validity.badInput) continue;
    const digits = input.value.trim();
    body[input.id.replace("side-", "")] = new Raw(/^-?\d+$/.test(digits) ? String(BigInt(digits)) : String(Number(digits)));
  }
  const stop = find("#side-stop").value.split("\n").filter(Boolean).map((line) => line.replace(/\\n/g, "\n").replace(/\\t/g, "\t"));
  if (stop.length) body.stop = stop.length > 1 ? stop : stop[0];
  return body;
}

// ---- the page ----

const asked = new URLSearchParams(location.search).get("model");
const sides = [new Column(models.includes(asked) ? asked : null)];

function changed() {
  const busy = sides.some((side) => side.busy);
  find("#send").disabled = busy || !models.length;
  find("#stop").disabled = !busy;
  find("#retry").disabled = busy || !sides.some((side) => side.turns.length);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || sides.some((side) => side.busy)) return;
  message.value = "";
  for (const side of sides) side.ask(text);
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    composer.requestSubmit();
  }
});
find("#stop").addEventListener("click", () => {
  for (const side of sides) side.controller?.abort();
  message.focus();
});
find("#retry").addEventListener("click", () => {
  for (const side of sides) side.retry();
});
find("#clear").addEventListener("click", () => {
  for (const side of sides) side.clear();
  changed();
  message.focus();
});
find("#compare").addEventListener("click", (event) => {
  if (sides.length === 1) {
    const other = models.find((model) => model !== sides[0].select.value);
    const side = new Column(other ?? null);
    sides.push(side);
  } else {
    const side = sides.pop();
    side.clear();
    side.element.remove();
  }
  event.target.setAttribute("aria-pressed", String(sides.length === 2));
  changed();
});

// ---- the parameters ----

for (const slide of all(".slide", settings)) {
  const [exact, rough] = all("input", slide);
  const resting = rough.value;
  rough.addEventListener("input", () => (exact.value = rough.value));
  exact.addEventListener("input", () => (rough.value = exact.value === "" ? resting : exact.value));
}
find("#defaults").addEventListener("click", () => {
  for (const input of all("input, textarea", settings)) input.value = input.defaultValue;
});
find("#settings-button").addEventListener("click", (event) => {
  const open = settings.toggleAttribute("data-open");
  event.target.setAttribute("aria-expanded", String(open));
  event.target.textContent = open ? "Back to the chat" : "Parameters";
});

changed();
message.focus({ preventScroll: true });
