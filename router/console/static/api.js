// Asking /api, and saying what went wrong.

import { find, make } from "./dom.js";

const meta = find('meta[name="csrf-token"]');

/** What shows the server that a request comes from one of its pages. */
export const CSRF = meta ? meta.content : "";

/** An error of the API, or of the way to it. */
export class Failure extends Error {
  constructor(status, { message = "", code = null, param = null } = {}, retryAfter = null) {
    super(message || "The server gave an answer that makes no sense.");
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

/** The JSON that a method and a path answer. Throws Failure; a session that has ended is said above the page. */
export async function api(method, path, body, signal) {
  const headers = { accept: "application/json", "x-csrf-token": CSRF };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, { message: "The server cannot be reached." });
  }
  let answer = {};
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (response.ok) throw new Failure(response.status);
  }
  if (response.ok) return answer;
  const failure = new Failure(response.status, answer.error ?? {}, response.headers.get("retry-after"));
  if (failure.status === 401 && failure.code !== "wrong_password") sessionEnded();
  throw failure;
}

/** What a person reads of an error. */
export function reason(error) {
  if (!(error instanceof Failure)) return `Something went wrong: ${error.message}`;
  const text = error.message.replace(/^[a-z]/, (letter) => letter.toUpperCase());
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

/** Say above the page that nothing works any more without logging in. */
export function sessionEnded() {
  const alerts = find("#alerts");
  if (!alerts || alerts.childElementCount) return;
  const after = encodeURIComponent(location.pathname + location.search);
  alerts.append(
    make(
      "p",
      { class: "notice bad" },
      make("span", {}, "Your session has ended."),
      make("a", { href: `/login?next=${after}` }, "Log in again"),
    ),
  );
}
