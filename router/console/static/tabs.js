// Tabs, with the keys that people expect of them.

import { all } from "./dom.js";

/** Makes the tabs of a list work. Returns what shows one of them, by its id. */
export function tabs(list) {
  const every = all('[role="tab"]', list);

  function show(tab) {
    for (const one of every) {
      const chosen = one === tab;
      one.setAttribute("aria-selected", String(chosen));
      one.tabIndex = chosen ? 0 : -1;
      document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
    }
  }

  list.addEventListener("click", (event) => {
    const tab = event.target.closest('[role="tab"]');
    if (tab) show(tab);
  });
  list.addEventListener("keydown", (event) => {
    const place = every.indexOf(document.activeElement);
    const steps = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: every.length - 1 };
    if (place < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const tab = every[(steps[event.key] + every.length) % every.length];
    show(tab);
    tab.focus();
  });
  return (id) => show(document.getElementById(id));
}
