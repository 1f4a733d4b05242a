// People: accounts, made and changed by administrators.

import { api, reason } from "./api.js";
import { copy, dialog, find, make, say } from "./dom.js";
import { date } from "./format.js";
import { fillLimits, readLimits, shownLimits } from "./limits.js";

const rows = find("#rows");
const state = find("#state");
const self = rows.dataset.self;
const edit = dialog("edit");
const shown = dialog("shown");
const disable = dialog("disable");
let changing = null;
let disabling = null;
/** What the form is for: "create", "role", "password" or "limits". */
let purpose = "create";

function button(text, name, act, disabled = false) {
  const element = make("button", { type: "button", class: "small", "aria-label": `${text}: ${name}`, disabled }, text);
  element.addEventListener("click", act);
  return element;
}

function row(person) {
  const own = person.id === self;
  const actions = make("div", { class: "row-actions" }, button("Limits", person.name, () => open("limits", person)));
  if (!own) {
    actions.append(
      button("Change role", person.name, () => open("role", person)),
      button("New password", person.name, () => open("password", person)),
      person.disabled ? button("Enable", person.name, () => enable(person)) : button("Disable", person.name, () => ask(person)),
    );
  }
  return make(
    "tr",
    { class: person.disabled ? "gone" : null, "data-id": person.id },
    make("th", { scope: "row", class: "wide" }, person.name, own ? make("span", { class: "quiet" }, " (you)") : null),
    make("td", { "data-label": "Role" }, person.role),
    make("td", { "data-label": "Limits" }, shownLimits(person.limits)),
    make("td", { "data-label": "State" }, make("span", { class: person.disabled ? "badge" : "badge good" }, person.disabled ? "disabled" : "enabled")),
    make("td", { "data-label": "Created", class: "nowrap" }, date(person.created)),
    make("td", { class: "wide" }, actions),
  );
}

async function load() {
  try {
    const { data } = await api("GET", "/api/accounts");
    rows.replaceChildren(...data.map(row));
    say(state, "");
  } catch (error) {
    say(state, reason(error), true);
  }
  find("#list").setAttribute("aria-busy", "false");
}

// ---- creating, another role, another password, limits ----

const TITLES = {
  create: () => ["Create an account", "Create"],
  role: (person) => [`The role of ${person.name}`, "Save"],
  password: (person) => [`A new password for ${person.name}`, "Set it"],
  limits: (person) => [`The limits of ${person.name}`, "Save"],
};

/** The parts of the form that each purpose shows. */
const PARTS = { create: ["name", "role", "password", "limits"], role: ["role"], password: ["password"], limits: ["limits"] };

const FIRST = { create: "#person-name", role: "#person-role", password: "#person-password", limits: "#limits-overall input" };

function open(what, person = null) {
  purpose = what;
  changing = person;
  const [title, save] = TITLES[what](person);
  find("#edit-title").textContent = title;
  find("#edit-save").textContent = save;
  for (const part of PARTS.create) find(`#${part}-row`).hidden = !PARTS[what].includes(part);
  find("#person-name").disabled = what !== "create";
  find("#person-password").required = what === "password";
  find("#person-password-hint").textContent =
    what === "create" ? "Left empty, one is made up and shown once" : "It ends every log-in of this account";
  find("#person-name").value = "";
  find("#person-password").value = "";
  find("#person-role").value = person?.role ?? "member";
  fillLimits(what === "limits" ? person.limits : {});
  say(find("#edit-error"), "", true);
  edit.showModal();
  find(FIRST[what]).focus();
}

async function save() {
  const said = { role: find("#person-role").value, password: find("#person-password").value, limits: readLimits() };
  if (purpose === "create") {
    const name = find("#person-name").value.trim();
    const made = await api("POST", "/api/accounts", { ...said, name, password: said.password || undefined });
    edit.close();
    if (made.password) showSecret(made);
  } else {
    await api("PATCH", `/api/accounts/${changing.id}`, { [purpose]: said[purpose] });
    edit.close();
  }
}

find("#edit-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  find("#edit-save").disabled = true;
  try {
    await save();
    await load();
  } catch (error) {
    say(find("#edit-error"), reason(error), true);
  }
  find("#edit-save").disabled = false;
});
find("#create").addEventListener("click", () => open("create"));

function showSecret(made) {
  find("#shown-text").textContent = `The password of ${made.name} is shown this once. Hand it over safely; it can be changed after the first log-in.`;
  find("#secret").textContent = made.password;
  find("#copied").textContent = "";
  shown.setAttribute("data-keep", "");
  shown.showModal();
  find("#copy").focus();
}

find("#copy").addEventListener("click", () => copy(find("#secret"), find("#copied")));
shown.addEventListener("close", () => (find("#secret").textContent = ""));

// ---- disabling ----

function ask(person) {
  disabling = person;
  find("#disable-text").textContent = `${person.name} is logged out, and its keys stop working, until it is enabled again.`;
  say(find("#disable-error"), "", true);
  disable.showModal();
}

find("#disable-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  find("#disable-yes").disabled = true;
  try {
    await api("PATCH", `/api/accounts/${disabling.id}`, { disabled: true });
    disable.close();
    await load();
    find("#create").focus();
  } catch (error) {
    say(find("#disable-error"), reason(error), true);
  }
  find("#disable-yes").disabled = false;
});

async function enable(person) {
  try {
    await api("PATCH", `/api/accounts/${person.id}`, { disabled: false });
    await load();
  } catch (error) {
    say(state, reason(error), true);
  }
}

load();
