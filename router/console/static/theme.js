// Puts the chosen theme on before anything is drawn. A classic script, so that it comes first.
"use strict";
{
  let theme = null;
  try {
    theme = localStorage.getItem("trunkline-theme");
  } catch {
    // A browser that keeps nothing follows the system.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
