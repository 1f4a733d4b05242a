// The request as a program: what is filled in, in several languages.

import { make } from "./dom.js";
import { Raw, toJson, toNode, toPython } from "./json.js";

const CHAT = "/v1/chat/completions";

function shell({ path, body, provider, origin }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl ${body.stream ? "-N " : ""}${origin}${path}`,
    '-H "Authorization: Bearer $TRUNKLINE_KEY"',
    provider && '-H "X-OpenAI-Api-Key: $OPENAI_API_KEY"',
    '-H "Content-Type: application/json"',
    `-d ${quoted(toJson(body))}`,
  ];
  return lines.filter(Boolean).join(" \\\n  ");
}

/** The arguments of a call, those that the SDK does not know apart. */
function pythonArguments(body, beyond) {
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => beyond.has(name)));
  const known = Object.entries(body).filter(([name]) => !beyond.has(name));
  const lines = known.map(([name, value]) => `  ${name}=${toPython(value, 1)},`);
  if (Object.keys(extra).length) lines.push(`  extra_body=${toPython(extra, 1)},`);
  return lines.join("\n").replace(/^( +)/gm, (space) => space + space);
}

function pythonPrint({ path, body }) {
  const text = path === CHAT ? "choice.delta.content or \"\"" : "choice.text";
  const whole = path === CHAT ? "choice.message.content" : "choice.text";
  if (!body.stream) return `for choice in answer.choices:\n    print(${whole})`;
  return `for chunk in answer:\n    for choice in chunk.choices:\n        print(${text}, end="", flush=True)`;
}

function python({ path, body, provider, origin, beyond }) {
  const call = path === CHAT ? "chat.completions" : "completions";
  const headers = provider ? '\n    default_headers={"X-OpenAI-Api-Key": os.environ["OPENAI_API_KEY"]},' : "";
  return `import os

from openai import OpenAI

client = OpenAI(
    base_url="${origin}/v1",
    api_key=os.environ["TRUNKLINE_KEY"],${headers}
)

answer = client.${call}.create(
${pythonArguments(body, beyond)}
)
${pythonPrint({ path, body })}`;
}

function konko({ path, body, provider, origin, beyond }) {
  const call = path === CHAT ? "chat.completions" : "completions";
  const key = provider ? '\nkonko.openai_api_key = os.environ["OPENAI_API_KEY"]' : "";
  return `import os

import konko

konko.base_url = "${origin}/v1"
konko.api_key = os.environ["TRUNKLINE_KEY"]${key}

answer = konko.${call}.create(
${pythonArguments(body, beyond)}
)
${pythonPrint({ path, body })}`;
}

function node({ path, body, provider, origin }) {
  const chat = path === CHAT;
  const call = chat ? "chat.completions" : "completions";
  const headers = provider ? '\n  defaultHeaders: { "X-OpenAI-Api-Key": process.env.OPENAI_API_KEY },' : "";
  const print = body.stream
    ? `for await (const chunk of answer) {\n  for (const choice of chunk.choices) process.stdout.write(${chat ? 'choice.delta.content ?? ""' : "choice.text"});\n}`
    : `for (const choice of answer.choices) console.log(${chat ? "choice.message.content" : "choice.text"});`;
  return `import OpenAI from "openai";

const client = new OpenAI({
  baseURL: "${origin}/v1",
  apiKey: process.env.TRUNKLINE_KEY,${headers}
});

const answer = await client.${call}.create(${toNode(body)});
${print}`;
}

const LANGUAGES = { shell, python, node, konko };

const HINTS = {
  shell: "",
  python: "pip install openai",
  node: "npm install openai",
  konko: 'pip install "konko==0.5.0" "openai<2"',
};

/** The program that makes the request. `beyond` names the parameters that OpenAI's Python SDK has no argument for. */
export function sample(language, request) {
  return LANGUAGES[language](request);
}

/** What has to be there, and what to mind. */
export function hint(language, { body }) {
  const lossy =
    language === "node" && Object.values(body).some((value) => value instanceof Raw && !Number.isSafeInteger(Number(value.text)) && /^-?\d+$/.test(value.text));
  const parts = [HINTS[language] && `Needs ${HINTS[language]}. `, "Put your key into TRUNKLINE_KEY."];
  if (lossy) parts.push(" JavaScript rounds integers as large as this one.");
  return parts.filter(Boolean).join("");
}

// ---- colours ----

const TOKENS =
  /("(?:[^"\\\n]|\\.)*"|'(?:[^'\\]|\\.)*')|(#[^\n]*|\/\/[^\n]*)|\b(import|from|for|in|or|const|new|await|of|print|curl|None|True|False|null|true|false)\b|(-?\b\d+(?:\.\d+)?(?:e[+-]?\d+)?\b)/g;
const KINDS = [null, "tok-string", "tok-comment", "tok-word", "tok-number"];

/** The program in colours, as elements. */
export function coloured(text, language) {
  if (language === "shell") return [text];
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TOKENS)) {
    const kind = KINDS[match.findIndex((group, place) => place > 0 && group !== undefined)];
    parts.push(text.slice(end, match.index), make("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}
