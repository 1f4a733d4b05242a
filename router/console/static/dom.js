// Finding and making elements. Text becomes text and never markup.

export const find = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

const SVG = "http://www.w3.org/2000/svg";

/** An element with these attributes and children; attributes that are null or false are left out. */
export function make(tag, attributes = {}, ...children) {
  return dressed(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function draw(tag, attributes = {}, ...children) {
  return dressed(document.createElementNS(SVG, tag), attributes, children);
}

function dressed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Say something under a list or in a form, or, without a text, nothing. */
export function say(element, text, bad = false) {
  element.textContent = text;
  element.hidden = !text;
  element.classList.toggle("bad", bad);
}

/** Put a text on the clipboard and say so; where a browser forbids it, select the text. */
export async function copy(source, status) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    if (status) status.textContent = "Copied.";
    return true;
  } catch {
    getSelection().selectAllChildren(source);
    if (status) status.textContent = "Selected: press Ctrl + C to copy it.";
    return false;
  }
}

/** A dialog that its buttons with data-close, Escape and a press beside it close. */
export function dialog(id) {
  const element = document.getElementById(id);
  for (const button of all("[data-close]", element)) button.addEventListener("click", () => element.close());
  element.addEventListener("mousedown", (event) => {
    const box = element.getBoundingClientRect();
    const inside =
      event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    if (event.target === element && !inside && !element.hasAttribute("data-keep")) element.close();
  });
  return element;
}

/** Calls `work` now and every so many milliseconds, one at a time, while somebody looks. Returns what ends it. */
export function poll(work, milliseconds) {
  let timer = 0;
  let ended = false;
  let working = false;
  const turn = async () => {
    working = true;
    if (!document.hidden) await work();
    working = false;
    if (!ended) timer = setTimeout(turn, milliseconds);
  };
  const look = () => {
    if (document.hidden || ended || working) return;
    clearTimeout(timer);
    turn();
  };
  document.addEventListener("visibilitychange", look);
  turn();
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", look);
  };
}
