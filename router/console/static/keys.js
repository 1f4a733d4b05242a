// Keys: listed, made, changed, revoked.

import { api, reason } from "./api.js";
import { all, copy, dialog, find, make, say } from "./dom.js";
import { date } from "./format.js";
import { fillLimits, lines, readLimits, sayTogether, shownLimits } from "./limits.js";

const rows = find("#rows");
const state = find("#state");
const admin = JSON.parse(rows.dataset.admin);
const edit = dialog("edit");
const shown = dialog("shown");
const revoke = dialog("revoke");
let keys = [];
let changing = null;
let revoking = null;

// ---- the list ----

const cell = (label, ...content) => make("td", { "data-label": label }, ...content);

function badge(key) {
  if (key.revoked) return make("span", { class: "badge bad" }, "revoked");
  return make("span", { class: "badge good" }, key.kind === "console" ? "console" : "in use");
}

function button(text, name, act, kind = "") {
  const element = make("button", { type: "button", class: `small ${kind}`, "aria-label": `${text} ${name}` }, text);
  element.addEventListener("click", act);
  return element;
}

function row(key) {
  const actions = make("div", { class: "row-actions" });
  if (!key.revoked && key.kind !== "console") {
    actions.append(button(admin ? "Change" : "Rename", key.name, () => open(key)), button("Revoke", key.name, () => ask(key)));
  }
  return make(
    "tr",
    { class: key.revoked ? "gone" : null, "data-id": key.id },
    make("th", { scope: "row", class: "wide" }, key.name, admin ? make("span", { class: "quiet second" }, key.account) : null),
    cell("Key", key.prefix ? make("code", { class: "nowrap" }, `${key.prefix}…`) : "–"),
    cell("Models", key.models === null ? "every model" : lines(key.models)),
    cell("Limits", shownLimits(key.limits)),
    make("td", { "data-label": "Created", class: "nowrap" }, date(key.created)),
    key.revoked ? cell("State", badge(key), " ", date(key.revoked)) : cell("State", badge(key)),
    make("td", { class: "wide" }, actions),
  );
}

function show() {
  const wanted = keys.filter((key) => !key.revoked || find("#show-revoked").checked);
  rows.replaceChildren(...wanted.map(row));
  say(state, wanted.length ? "" : "There are no keys. Create one to call the API.");
}

async function load() {
  try {
    keys = (await api("GET", "/api/keys")).data;
    show();
  } catch (error) {
    say(state, reason(error), true);
  }
  find("#list").setAttribute("aria-busy", "false");
}

find("#show-revoked").addEventListener("change", show);

// ---- creating and changing ----

async function accounts(chosen) {
  const select = find("#key-account");
  if (!select || select.childElementCount) return;
  const [{ data }, me] = await Promise.all([api("GET", "/api/accounts"), api("GET", "/api/me")]);
  select.append(...data.filter((one) => !one.disabled).map((one) => make("option", { value: one.id }, one.name)));
  select.value = chosen ?? me.account.id;
}

function open(key) {
  changing = key;
  find("#edit-title").textContent = key ? `Change ${key.name}` : "Create a key";
  find("#edit-save").textContent = key ? "Save" : "Create";
  find("#key-name").value = key?.name ?? "";
  say(find("#edit-error"), "", true);
  if (admin) fillForAdmin(key);
  edit.showModal();
  find("#key-name").focus();
}

function fillForAdmin(key) {
  find("#key-account-row").hidden = Boolean(key);
  if (!key) accounts().catch((error) => say(find("#edit-error"), reason(error), true));
  const models = key?.models ?? null;
  for (const radio of all('input[name="which"]', edit)) radio.checked = (radio.value === "some") === (models !== null);
  for (const box of all("#key-models input")) box.checked = models?.includes(box.value) ?? false;
  find("#key-models").hidden = models === null;
  fillLimits(key?.limits);
}

for (const radio of all('input[name="which"]', edit)) {
  radio.addEventListener("change", () => (find("#key-models").hidden = radio.value !== "some"));
}

function filledIn() {
  const body = { name: find("#key-name").value.trim() };
  if (!admin) return body;
  const some = find('input[name="which"]:checked', edit).value === "some";
  body.models = some ? all("#key-models input:checked").map((box) => box.value) : null;
  body.limits = readLimits();
  if (!changing) body.account_id = find("#key-account").value;
  return body;
}

find("#edit-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  find("#edit-save").disabled = true;
  try {
    const made = changing ? await api("PATCH", `/api/keys/${changing.id}`, filledIn()) : await api("POST", "/api/keys", filledIn());
    edit.close();
    if (!changing) showSecret(made.key);
    await load();
  } catch (error) {
    say(find("#edit-error"), reason(error), true);
  }
  find("#edit-save").disabled = false;
});
find("#create").addEventListener("click", () => open(null));

// ---- the new key ----

function showSecret(key) {
  find("#secret").textContent = key;
  find("#copied").textContent = "";
  // It is not shown again: a slip of the pointer must not close it.
  shown.setAttribute("data-keep", "");
  shown.showModal();
  find("#copy").focus();
}

find("#copy").addEventListener("click", () => copy(find("#secret"), find("#copied")));
shown.addEventListener("close", () => (find("#secret").textContent = ""));

// ---- revoking ----

function ask(key) {
  revoking = key;
  find("#revoke-text").textContent = `“${key.name}” (${key.prefix}…) stops working everywhere within two seconds. It cannot be undone.`;
  say(find("#revoke-error"), "", true);
  revoke.showModal();
}

find("#revoke-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  find("#revoke-yes").disabled = true;
  try {
    await api("DELETE", `/api/keys/${revoking.id}`);
    revoke.close();
    await load();
    find("#create").focus();
  } catch (error) {
    say(find("#revoke-error"), reason(error), true);
  }
  find("#revoke-yes").disabled = false;
});

sayTogether();
load();
