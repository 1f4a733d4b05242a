// The form to log in: the password can be looked at.

import { find } from "./dom.js";

const password = find("#password");

find("#show-password").addEventListener("change", (event) => {
  password.type = event.target.checked ? "text" : "password";
});
find("form").addEventListener("submit", () => {
  // A browser keeps for later what was typed into a field of plain text.
  password.type = "password";
});
