// One request for tokens: sent, read as it comes, and timed.

import { CSRF } from "./api.js";
import { EventReader } from "./sse.js";

/** What has come of an answer so far. Times are milliseconds of performance.now(). */
class Answer {
  constructor() {
    this.began = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.endedAt = null;
    this.status = 0;
    this.headers = [];
    this.streamed = false;
    this.raw = "";
    this.choices = [];
    this.pieces = 0;
    this.usage = null;
    this.error = null;
    this.done = false;
  }

  get total() {
    return (this.endedAt ?? performance.now()) - this.began;
  }

  get first() {
    return this.firstAt === null ? null : this.firstAt - this.began;
  }

  /** Generated tokens: as the server counted them, or else the pieces that came. */
  get tokens() {
    return this.usage ? this.usage.completion_tokens : this.pieces || null;
  }

  /** Of a stream after its first token, of a whole answer over all of its time. */
  get tokensPerSecond() {
    if (!this.tokens) return null;
    if (!this.streamed) return this.endedAt ? (this.tokens / this.total) * 1000 : null;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
  }

  choice(index) {
    while (this.choices.length <= index) this.choices.push({ text: "", reasoning: "", calls: [], finish: null });
    return this.choices[index];
  }

  /** Take the JSON of a whole answer or of one event. */
  take(json) {
    if (json.error) this.error = json.error;
    if (json.usage) this.usage = json.usage;
    let said = false;
    for (const part of json.choices ?? []) {
      const choice = this.choice(part.index ?? 0);
      const piece = part.delta ?? part.message ?? {};
      const text = part.text ?? piece.content ?? "";
      const reasoning = piece.reasoning_content ?? "";
      choice.text += text;
      choice.reasoning += reasoning;
      for (const call of piece.tool_calls ?? []) addCall(choice.calls, call);
      if (part.finish_reason) choice.finish = part.finish_reason;
      if (text || reasoning || piece.tool_calls?.length) {
        said = true;
        this.pieces += 1;
      }
    }
    if (said) {
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
    }
  }
}

function addCall(calls, piece) {
  const place = piece.index ?? calls.length;
  calls[place] ??= { name: "", arguments: "" };
  calls[place].name += piece.function?.name ?? "";
  calls[place].arguments += piece.function?.arguments ?? "";
}

/** Sends a body (JSON, as text) and returns the answer when it has ended. `onNews` is called with it whenever there
 * is more. Without a key the session's cookie is sent. Throws where the server cannot be reached, and AbortError. */
export async function complete({ path, body, bearer = "", providerKey = "", signal }, onNews = () => {}) {
  const headers = { "content-type": "application/json" };
  if (bearer) headers.authorization = `Bearer ${bearer}`;
  else headers["x-csrf-token"] = CSRF;
  if (providerKey) headers["x-openai-api-key"] = providerKey;
  const answer = new Answer();
  try {
    const response = await fetch(path, {
      method: "POST",
      headers,
      body,
      signal,
      credentials: bearer ? "omit" : "same-origin",
      cache: "no-store",
    });
    answer.status = response.status;
    answer.headers = [...response.headers];
    answer.streamed = (response.headers.get("content-type") ?? "").startsWith("text/event-stream");
    onNews(answer);
    await read(response, answer, onNews);
  } finally {
    answer.endedAt = performance.now();
    onNews(answer);
  }
  return answer;
}

async function read(response, answer, onNews) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = new EventReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    answer.raw += value;
    if (answer.streamed) for (const data of events.feed(value)) takeEvent(answer, data);
    onNews(answer);
  }
  if (!answer.streamed) takeWhole(answer);
  else if (!answer.done && !answer.error) answer.error = { message: "the stream ended without its end" };
}

function takeEvent(answer, data) {
  if (data === "[DONE]") answer.done = true;
  else answer.take(parsed(data));
}

function takeWhole(answer) {
  answer.take(parsed(answer.raw));
  // A whole answer comes at once: there is no first token to time.
  answer.firstAt = null;
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return { error: { message: "what came is not JSON" } };
  }
}

/** Why a request came to nothing, for a person. */
export function whyNot(error) {
  if (error.name === "AbortError") return "Stopped.";
  if (error instanceof TypeError && /header/i.test(error.message)) return "A key has characters that a header cannot have.";
  return "The server cannot be reached, or the connection was lost.";
}
