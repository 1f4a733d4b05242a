// Numbers, money and moments as people read them.

import { make } from "./dom.js";

const whole = new Intl.NumberFormat("en");
const brief = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const day = new Intl.DateTimeFormat("en", { day: "numeric", month: "short" });
const long = new Intl.DateTimeFormat("en", { day: "numeric", month: "short", year: "numeric" });
const NANO = 1_000_000_000n;

export const count = (number) => (number === null || number === undefined ? "–" : whole.format(number));
export const compact = (number) => brief.format(number);

/** Milliseconds with as many digits as say something. */
export function duration(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "–";
  if (milliseconds < 10) return `${milliseconds.toFixed(1)} ms`;
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60_000) return `${(milliseconds / 1000).toFixed(2)} s`;
  return `${Math.floor(milliseconds / 60_000)} min ${Math.round((milliseconds % 60_000) / 1000)} s`;
}

export function speed(tokensPerSecond) {
  if (tokensPerSecond === null || tokensPerSecond === undefined || !Number.isFinite(tokensPerSecond)) return "–";
  return tokensPerSecond < 100 ? tokensPerSecond.toFixed(1) : count(Math.round(tokensPerSecond));
}

// ---- money: whole nano-dollars, so that sums are exact ----

export function nano(dollars) {
  const [before, after = ""] = String(dollars ?? "0").split(".");
  return BigInt(before || "0") * NANO + BigInt(after.padEnd(9, "0").slice(0, 9));
}

/** To the last digit. */
export function exactMoney(nanoDollars) {
  const after = String(nanoDollars % NANO).padStart(9, "0").replace(/0+$/, "");
  return `$${whole.format(nanoDollars / NANO)}${after ? `.${after.padEnd(2, "0")}` : ".00"}`;
}

/** Rounded to what says something: cents from a dollar on, otherwise three digits. */
export function money(nanoDollars) {
  if (nanoDollars === 0n) return "$0";
  const dollars = Number(nanoDollars) / 1e9;
  if (dollars >= 1) return `$${dollars.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  return `$${dollars.toLocaleString("en", { maximumSignificantDigits: 3, maximumFractionDigits: 9 })}`;
}

export const price = (dollars) => exactMoney(nano(dollars));

// ---- moments ----

const two = (number) => String(number).padStart(2, "0");

/** A moment in the reader's zone, the same by UTC in its title. */
export function moment(iso) {
  const at = new Date(iso);
  const clock = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const now = new Date();
  const today = at.toDateString() === now.toDateString();
  const year = at.getFullYear() === now.getFullYear() ? "" : ` ${at.getFullYear()}`;
  const text = today ? clock : `${day.format(at)}${year}, ${clock}`;
  return make("time", { datetime: iso, title: utc(iso) }, text);
}

/** The day of a moment in the reader's zone, the whole by UTC in its title. */
export function date(iso) {
  return make("time", { datetime: iso, title: utc(iso) }, long.format(new Date(iso)));
}

export const utc = (iso) => `${iso.replace("T", " ").replace("Z", "")} UTC`;

/** What an input of a moment in the reader's zone shows. */
export function localInput(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return "";
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}T${two(at.getHours())}:${two(at.getMinutes())}`;
}

/** A day by UTC: 2026-11-30. */
export const utcDay = (date) => date.toISOString().slice(0, 10);

/** A day by UTC as an axis has it. */
export function shortDay(iso) {
  return new Date(`${iso}T12:00:00Z`).toLocaleDateString("en", { day: "numeric", month: "short", timeZone: "UTC" });
}
