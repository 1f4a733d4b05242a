// The cards of models: found by a word, their states as they are now.

import { all, find, poll } from "./dom.js";

const cards = all(".model");
const search = find("#search");

search?.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
    found += card.hidden ? 0 : 1;
  }
  find("#none").hidden = found > 0;
});

async function states() {
  try {
    const { models } = await (await fetch("/health", { cache: "no-store" })).json();
    for (const card of cards) {
      const state = models[card.dataset.name];
      const badge = find("[data-state]", card);
      if (!state || badge.textContent === state) continue;
      badge.textContent = state;
      badge.className = `badge state-${state}`;
    }
  } catch {
    // The states that were known stay.
  }
}

poll(states, 5000);
