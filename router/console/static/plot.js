// Plots: bars by day, stacked, and bars by name. Each has a title and a description, and the page has their numbers
// as a table besides.

import { draw, make } from "./dom.js";

/** Colours that can be told apart; whatever comes after the last but one is together. */
export const COLOURS = 8;

const TOP = 8;
const BOTTOM = 24;
const HEIGHT = 240;

/** Round steps up to at least `most`. */
function ticks(most, wanted = 4) {
  if (most <= 0) return [0, 1];
  const rough = most / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, place) => place * step);
}

/** Draws `plot` now and whenever its element changes its width. Returns what ends that. */
function fitted(element, plot) {
  let width = 0;
  const observer = new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now && now !== width) plot((width = now));
  });
  observer.observe(element);
  return () => observer.disconnect();
}

const ends = new WeakMap();

function begin(element, plot) {
  ends.get(element)?.();
  ends.set(element, fitted(element, plot));
}

let made = 0;

function frame(width, height, title, description) {
  const id = `plot-${(made += 1)}`;
  return draw(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": `${id}-title`, "aria-describedby": `${id}-text` },
    draw("title", { id: `${id}-title` }, title),
    draw("desc", { id: `${id}-text` }, description),
  );
}

/** Stacked bars, one for each day.
 *
 * `days`: [{label, title}]; `series`: [{name, values}] with a number for each day; `shown` writes a number, `exact(series,
 * day)` writes it to the last digit. */
export function byDay(element, { days, series, title, description, shown, exact }) {
  begin(element, (width) => {
    const sums = days.map((_, day) => series.reduce((sum, one) => sum + one.values[day], 0));
    const marks = ticks(Math.max(...sums));
    const top = marks.at(-1);
    const left = 12 + 7.5 * Math.max(...marks.map((mark) => shown(mark).length));
    const inner = { width: width - left - 4, height: HEIGHT - TOP - BOTTOM };
    const y = (value) => TOP + inner.height * (1 - value / top);
    const step = inner.width / days.length;
    const bar = Math.min(step * 0.72, 56);
    const svg = frame(width, HEIGHT, title, description);
    for (const mark of marks) {
      svg.append(
        draw("line", { class: mark ? "grid" : "axis", x1: left, x2: width - 4, y1: y(mark), y2: y(mark) }),
        draw("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end", "aria-hidden": "true" }, shown(mark)),
      );
    }
    const every = Math.ceil(days.length / Math.max(1, Math.floor(inner.width / 64)));
    const tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    days.forEach((day, place) => {
      const middle = left + step * (place + 0.5);
      let base = 0;
      series.forEach((one, colour) => {
        const value = one.values[place];
        if (value <= 0) return;
        const height = Math.max(y(base) - y(base + value), 1);
        svg.append(draw("rect", { class: `bar series-${colour}`, x: middle - bar / 2, y: y(base + value), width: bar, height, rx: Math.min(2, height / 2) }));
        base += value;
      });
      if ((days.length - 1 - place) % every === 0) {
        svg.append(draw("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle", "aria-hidden": "true" }, day.label));
      }
      const hit = draw("rect", { class: "hit", x: left + step * place, y: TOP, width: step, height: inner.height });
      const show = () => {
        tip.replaceChildren(make("p", { class: "tip-title" }, day.title), lines(series, place, exact));
        tip.hidden = false;
        const right = middle + 12 + tip.offsetWidth > width;
        tip.style.setProperty("left", `${right ? Math.max(0, middle - 12 - tip.offsetWidth) : middle + 12}px`);
      };
      hit.addEventListener("pointerenter", show);
      hit.addEventListener("pointerleave", () => (tip.hidden = true));
      svg.append(hit);
    });
    element.replaceChildren(svg, tip, legend(series));
  });
}

function lines(series, place, exact) {
  const told = series.map((one, colour) => [one, colour]).filter(([one]) => one.values[place] > 0);
  if (!told.length) return make("p", { class: "quiet" }, "nothing");
  return make("ul", {}, ...told.map(([one, colour]) => make("li", {}, make("span", { class: `swatch series-${colour}` }), make("span", {}, one.name), make("span", {}, exact(one, place)))));
}

function legend(series) {
  return make("ul", { class: "legend" }, ...series.map((one, colour) => make("li", {}, make("span", { class: `swatch series-${colour}`, "aria-hidden": "true" }), one.name)));
}

const LINE = 34;

/** Lying bars, one for each name. `entries`: [{name, value, text}], the longest first. */
export function byName(element, { entries, title, description }) {
  begin(element, (width) => {
    const most = Math.max(...entries.map((entry) => entry.value), 0) || 1;
    const svg = frame(width, entries.length * LINE, title, description);
    entries.forEach((entry, place) => {
      const y = place * LINE;
      const length = Math.max((entry.value / most) * width, entry.value > 0 ? 2 : 0);
      svg.append(
        draw("text", { class: "name", x: 0, y: y + 13 }, fit(entry.name, width - 8 * entry.text.length - 16)),
        draw("text", { x: width, y: y + 13, "text-anchor": "end" }, entry.text),
        draw("rect", { class: `series-${Math.min(place, COLOURS - 1)}`, x: 0, y: y + 19, width: length, height: 7, rx: 3 }),
      );
    });
    element.replaceChildren(svg);
  });
}

function fit(text, width) {
  const most = Math.max(4, Math.floor(width / 7));
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** A small line of the last values. */
export function spark(values, most, length) {
  const points = values.map((value, place) => `${((length - values.length + place) / (length - 1)) * 100},${30 - (most ? (value / most) * 28 : 0)}`);
  return draw("svg", { viewBox: "0 0 100 32", preserveAspectRatio: "none", "aria-hidden": "true" }, draw("polyline", { points: points.join(" ") }));
}
