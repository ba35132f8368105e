// The npm package `ollama`.
import { drive, load, said, MESSAGES, PICTURE, QUESTION, TEXTS, TOOL } from "./told.mjs";

const { Ollama } = load("ollama");

const client = ({ url, key }) =>
  new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
const chat = (asked, more = {}) =>
  client(asked).chat({ model: asked.model, messages: asked.messages, ...more });

drive({
  list: async (asked) => (await client(asked).list()).models.map((model) => model.model),
  running: async (asked) => (await client(asked).ps()).models.map((model) => model.model),
  show: async (asked) => (await client(asked).show({ model: asked.model })).capabilities,
  chat: async (asked) => {
    const answer = await chat(asked);
    return said(answer.message.content, answer.prompt_eval_count, answer.eval_count);
  },
  stream: async (asked) => {
    const parts = [];
    for await (const part of await chat(asked, { stream: true })) parts.push(part.message.content);
    return parts;
  },
  generate: async (asked) => {
    const answer = await client(asked).generate({ model: asked.model, prompt: QUESTION });
    return said(answer.response, answer.prompt_eval_count, answer.eval_count);
  },
  tool: async (asked) => {
    const [call] = (await chat(asked, { tools: [TOOL] })).message.tool_calls;
    return [call.function.name, call.function.arguments];
  },
  picture: async (asked) => {
    const messages = [{ ...MESSAGES[0], images: [PICTURE] }];
    return (await chat({ ...asked, messages })).message.content;
  },
  json: async (asked) => JSON.parse((await chat(asked, { format: "json" })).message.content),
  embed: async (asked) =>
    (await client(asked).embed({ model: asked.model, input: TEXTS })).embeddings,
  cancel: async (asked) => {
    const taken = [];
    const parts = await chat(asked, { stream: true });
    for await (const part of parts) {
      taken.push(part.message.content);
      if (taken.length === 2) break;
    }
    parts.abort();
    return taken;
  },
  manage: async (asked) => {
    const ollama = client(asked);
    const states = [];
    for await (const part of await ollama.pull({ model: "new", stream: true })) {
      states.push(part.status);
    }
    await ollama.copy({ source: "new", destination: "copied" });
    await ollama.create({ model: "made", from: "copied" });
    for (const model of ["new", "copied", "made"]) await ollama.delete({ model });
    return [states.at(0), states.at(-1)];
  },
});
