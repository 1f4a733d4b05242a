// The form of a request: what is filled in as a body, and a body as what is filled in.

import { all, find, make } from "./dom.js";
import { Raw } from "./json.js";

const template = find("#message-template");

// ---- escapes in stop strings ----

const NAMES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
const unescaped = (text) => text.replace(/\\([ntr\\])/g, (_, letter) => NAMES[letter]);
const escaped = (text) =>
  text.replace(/[\\\n\t\r]/g, (letter) => `\\${Object.keys(NAMES).find((name) => NAMES[name] === letter)}`);

// ---- reading ----

/** Raised for what cannot be sent. */
class Wrong extends Error {}

function number(input) {
  if (input.validity.badInput) throw new Wrong("This is not a number.");
  const text = input.value.trim();
  if (text === "") return undefined;
  // Digits as they were typed: a seed may have more than a number holds here.
  return new Raw(/^-?\d+$/.test(text) ? String(BigInt(text)) : String(Number(text)));
}

function json(text, choices = []) {
  if (text.trim() === "") return undefined;
  if (choices.includes(text.trim())) return text.trim();
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Wrong(`This is not JSON: ${error.message}`);
  }
}

function message(element) {
  const role = find("[data-role]", element).value;
  const content = find("[data-content]", element).value;
  const said = { role, content };
  for (const extra of all("[data-extra]", element)) {
    const text = find("textarea", extra).value;
    if (extra.hidden || text === "") continue;
    said[extra.dataset.extra] = extra.dataset.widget === "json" ? json(text) : text;
  }
  if (content === "" && said.tool_calls) said.content = null;
  return said;
}

const READERS = {
  messages: (field) => all(".message", field).map(message),
  texts: (field) => {
    const texts = all("input", field).map((input) => unescaped(input.value)).filter(Boolean);
    return texts.length > 1 ? texts : texts[0];
  },
  prompt: (field) => {
    const text = find("textarea", field).value;
    return find("[data-as-json]", field).checked ? json(text) : text;
  },
  flag: (field) => ({ true: true, false: false })[find("select", field).value],
  choice: (field) => find("select", field).value || undefined,
  number: (field) => number(find("input", field)),
  integer: (field) => number(find("input", field)),
  text: (field) => find("input", field).value || undefined,
  json: (field) => json(find("textarea", field).value, field.dataset.parameter === "tool_choice" ? ["none", "auto", "required"] : []),
};

/** What is filled in, as a body, and the fields that cannot be sent. */
export function read(form) {
  const body = {};
  const wrong = [];
  for (const field of all("[data-parameter]", form)) {
    let value;
    let text = "";
    try {
      value = READERS[field.dataset.widget](field);
      text = doubt(field, value);
    } catch (error) {
      if (!(error instanceof Wrong)) throw error;
      wrong.push(field);
      text = error.message;
    }
    mark(field, text, wrong.includes(field));
    if (value !== undefined) put(body, field.dataset.parameter.split("."), value);
  }
  return { body, wrong };
}

function put(body, path, value) {
  const last = path.pop();
  const target = path.reduce((inner, name) => (inner[name] ??= {}), body);
  target[last] = value;
}

/** What the server is going to refuse, and may be sent all the same. */
function doubt(field, value) {
  const input = find("input[type=number]", field);
  if (input && value !== undefined) {
    const { rangeOverflow, rangeUnderflow, stepMismatch } = input.validity;
    if (rangeOverflow) return `Above ${input.max}: the server will refuse it.`;
    if (rangeUnderflow) return `Below ${input.min}: the server will refuse it.`;
    if (stepMismatch) return "Not a whole number: the server will refuse it.";
  }
  if (field.dataset.widget === "messages" && value.length === 0) return "There has to be a message.";
  return "";
}

function mark(field, text, wrong) {
  const error = find(".field-error", field);
  error.textContent = text;
  error.hidden = !text;
  error.classList.toggle("warning", !wrong);
  for (const input of all("input, select, textarea", field)) {
    if (wrong) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
}

// ---- filling in ----

export function addMessage(field, said = { role: "user", content: "" }) {
  const element = template.content.cloneNode(true).firstElementChild;
  find("[data-role]", element).value = said.role;
  find("[data-content]", element).value = said.content ?? "";
  for (const extra of all("[data-extra]", element)) {
    const value = said[extra.dataset.extra];
    if (value === undefined) continue;
    find("textarea", extra).value = typeof value === "string" ? value : JSON.stringify(value, null, 2);
    find("details", element).open = true;
  }
  find(".messages", field).append(element);
  renumber(field);
  return element;
}

/** Names the messages, and offers of each the fields that its role has. */
export function renumber(field) {
  all(".message", field).forEach((element, place) => {
    find("legend", element).textContent = `Message ${place + 1}`;
    find("[data-remove]", element).setAttribute("aria-label", `Remove message ${place + 1}`);
    const role = find("[data-role]", element).value;
    for (const extra of all("[data-extra]", element)) {
      extra.hidden = !extra.dataset.roles.trim().split(" ").includes(role);
    }
  });
}

export function addText(field, text = "") {
  const list = find(".texts", field);
  const name = `${field.dataset.parameter} ${list.childElementCount + 1}`;
  const input = make("input", { type: "text", "aria-label": name, autocomplete: "off", spellcheck: "false" });
  input.value = escaped(text);
  const remove = make("button", { type: "button", class: "small plain", "data-remove": true, "aria-label": `Remove ${name}` }, "Remove");
  list.append(make("div", { class: "text-row" }, input, remove));
  limitTexts(field);
  return input;
}

export function limitTexts(field) {
  const list = find(".texts", field);
  find("[data-add]", field).disabled = list.childElementCount >= Number(list.dataset.most);
}

function write(field, value) {
  const widget = field.dataset.widget;
  if (widget === "messages") {
    find(".messages", field).replaceChildren();
    for (const said of value ?? []) addMessage(field, said);
  } else if (widget === "texts") {
    find(".texts", field).replaceChildren();
    for (const text of [value ?? []].flat()) addText(field, text);
    limitTexts(field);
  } else if (widget === "prompt") {
    find("[data-as-json]", field).checked = value !== undefined && typeof value !== "string";
    find("textarea", field).value = typeof value === "string" ? value : value ? JSON.stringify(value) : "";
  } else {
    const input = find("input, select, textarea", field);
    const text = value === undefined || value === null ? "" : typeof value === "object" ? JSON.stringify(value, null, 2) : String(value);
    input.value = text;
    if (widget === "choice" && input.selectedIndex < 0) input.selectedIndex = 0;
  }
}

/** Fill in a body; what it does not have is emptied. */
export function fill(form, body) {
  for (const field of all("[data-parameter]", form)) {
    const value = field.dataset.parameter.split(".").reduce((inner, name) => inner?.[name], body);
    if (field.dataset.parameter === "model" && value === undefined) continue;
    write(field, value);
    const more = field.closest("details.more");
    if (more && value !== undefined) more.open = true;
  }
}
