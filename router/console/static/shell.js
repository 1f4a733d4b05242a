// The frame of every page: the menu of a narrow window, and the theme.

import { find } from "./dom.js";

const side = find(".side");
const menu = find("#menu-button");
const button = find("#theme-button");
const THEMES = ["automatic", "light", "dark"];

function open(opened) {
  side.toggleAttribute("data-open", opened);
  menu.setAttribute("aria-expanded", String(opened));
}

menu.addEventListener("click", () => open(menu.getAttribute("aria-expanded") !== "true"));
side.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && side.hasAttribute("data-open")) {
    open(false);
    menu.focus();
  }
});

function theme() {
  return document.documentElement.dataset.theme ?? "automatic";
}

function show() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  find("span", button).textContent = `Theme: ${theme()}`;
  button.title = `Switch to ${next}`;
}

button.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "automatic") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("trunkline-theme", next);
  } catch {
    // It holds for this page alone.
  }
  show();
});
show();
