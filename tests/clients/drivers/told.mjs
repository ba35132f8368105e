// What both npm drivers share: a line of JSON on stdin asks, a line on stdout answers. See told.py.
import { createInterface } from "node:readline";
import { createRequire } from "node:module";

// The packages lie where npm was run, not beside this file.
export const load = createRequire(`${process.cwd()}/`);

export const QUESTION = "a prompt that nobody else may read";
export const MESSAGES = [{ role: "user", content: QUESTION }];
export const PICTURE = "YSBwaWN0dXJl"; // base64
const CITY = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
export const WEATHER = { name: "weather", description: "The weather in a city", parameters: CITY };
export const TOOL = { type: "function", function: WEATHER };
export const TEXTS = ["a", "b"];

export const said = (text, read, written) => ({ text, tokens: [read, written] });

// The kinds of an exception, as far as the library named them.
function kinds(error) {
  const found = [];
  for (let at = error; at && at !== Object.prototype; at = Object.getPrototypeOf(at)) {
    found.push(at.constructor.name);
  }
  return [...new Set([error.name, ...found])];
}

export async function drive(actions) {
  console.log(JSON.stringify({ does: Object.keys(actions).sort() }));
  for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, megabytes = 0, model = "smollm2", ...asked } = JSON.parse(line);
    const messages = megabytes
      ? [{ role: "user", content: "x".repeat(megabytes << 20) }]
      : MESSAGES;
    let answer;
    try {
      answer = { gave: await actions[name]({ ...asked, model, messages }) };
    } catch (error) {
      answer = { raised: kinds(error), message: error.message };
    }
    console.log(JSON.stringify(answer));
  }
}
