// Values as JSON, Python and JavaScript write them.

/** A number whose digits are kept as they were typed. */
export class Raw {
  constructor(text) {
    this.text = text;
  }
}

const PLAIN = /^[A-Za-z_$][\w$]*$/;

const JSON_WORDS = { null: "null", true: "true", false: "false", key: (name) => `${JSON.stringify(name)}: ` };
const PYTHON_WORDS = { null: "None", true: "True", false: "False", key: (name) => `${JSON.stringify(name)}: `, comma: true };
const NODE_WORDS = {
  null: "null",
  true: "true",
  false: "false",
  key: (name) => (PLAIN.test(name) ? `${name}: ` : `${JSON.stringify(name)}: `),
  comma: true,
};

function written(value, indent, words) {
  if (value === undefined || value === null) return words.null;
  if (value instanceof Raw) return value.text;
  if (typeof value === "boolean") return value ? words.true : words.false;
  if (typeof value !== "object") return JSON.stringify(value);
  const array = Array.isArray(value);
  const entries = array
    ? value.map((item) => written(item, indent + 1, words))
    : Object.entries(value).map(([name, item]) => words.key(name) + written(item, indent + 1, words));
  const [open, close] = array ? "[]" : "{}";
  if (!entries.length) return open + close;
  const flat = open + entries.join(", ") + close;
  if (flat.length < 60 && !flat.includes("\n")) return flat;
  const space = "  ".repeat(indent + 1);
  return `${open}\n${space}${entries.join(`,\n${space}`)}${words.comma ? "," : ""}\n${"  ".repeat(indent)}${close}`;
}

export const toJson = (value) => written(value, 0, JSON_WORDS);
export const toPython = (value, indent = 0) => written(value, indent, PYTHON_WORDS);
export const toNode = (value, indent = 0) => written(value, indent, NODE_WORDS);
