// One's own account: its limits and the password.

import { api, reason } from "./api.js";
import { find, say } from "./dom.js";
import { sayTogether } from "./limits.js";

const form = find("#password-form");
const problem = find("#password-error");
const done = find("#password-done");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  say(done, "");
  const [old, fresh, again] = ["#old", "#new", "#again"].map((id) => find(id).value);
  if (fresh !== again) {
    say(problem, "The new passwords are not the same.", true);
    find("#again").focus();
    return;
  }
  say(problem, "", true);
  find("button", form).disabled = true;
  try {
    await api("POST", "/api/me/password", { old, new: fresh });
    form.reset();
    say(done, "The password is changed. Please log in with it.");
    done.classList.add("good");
    setTimeout(() => location.assign("/login?next=/account"), 1500);
  } catch (error) {
    say(problem, reason(error), true);
    find("#old").focus();
  }
  find("button", form).disabled = false;
});

sayTogether();
