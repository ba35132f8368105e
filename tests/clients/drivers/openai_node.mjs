// The npm package `openai`.
import { drive, load, said, MESSAGES, PICTURE, QUESTION, TEXTS, TOOL, WEATHER } from "./told.mjs";

const { OpenAI } = load("openai");

const client = ({ url, key }) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 30_000 });
const chat = (asked, more = {}) =>
  client(asked).chat.completions.create({
    model: asked.model,
    messages: asked.messages,
    ...more,
  });
const respond = (asked, more = {}) =>
  client(asked).responses.create({ model: asked.model, input: QUESTION, ...more });

drive({
  list: async (asked) => {
    const names = [];
    for await (const model of client(asked).models.list()) names.push(model.id);
    return names;
  },
  show: async (asked) => (await client(asked).models.retrieve(asked.model)).id,
  chat: async (asked) => {
    const { choices, usage } = await chat(asked);
    return said(choices[0].message.content, usage.prompt_tokens, usage.completion_tokens);
  },
  stream: async (asked) => {
    const parts = [];
    for await (const part of await chat(asked, { stream: true })) {
      parts.push(part.choices[0].delta.content);
    }
    return parts;
  },
  generate: async (asked) => {
    const { choices, usage } = await client(asked).completions.create({
      model: asked.model,
      prompt: QUESTION,
    });
    return said(choices[0].text, usage.prompt_tokens, usage.completion_tokens);
  },
  respond: async (asked) => {
    const answer = await respond(asked);
    return said(answer.output_text, answer.usage.input_tokens, answer.usage.output_tokens);
  },
  respond_in_parts: async (asked) => {
    const parts = [];
    for await (const event of await respond(asked, { stream: true })) {
      if (event.type === "response.output_text.delta") parts.push(event.delta);
    }
    return parts;
  },
  tool: async (asked) => {
    const [call] = (await chat(asked, { tools: [TOOL] })).choices[0].message.tool_calls;
    return [call.function.name, JSON.parse(call.function.arguments)];
  },
  tool_of_responses: async (asked) => {
    const [call] = (await respond(asked, { tools: [{ type: "function", ...WEATHER }] })).output;
    return [call.name, JSON.parse(call.arguments)];
  },
  picture: async (asked) => {
    const content = [
      { type: "text", text: QUESTION },
      { type: "image_url", image_url: { url: `data:image/png;base64,${PICTURE}` } },
    ];
    const messages = [{ ...MESSAGES[0], content }];
    return (await chat({ ...asked, messages })).choices[0].message.content;
  },
  json: async (asked) => {
    const answer = await chat(asked, { response_format: { type: "json_object" } });
    return JSON.parse(answer.choices[0].message.content);
  },
  embed: async (asked) => {
    const answer = await client(asked).embeddings.create({ model: asked.model, input: TEXTS });
    return answer.data.map((item) => item.embedding);
  },
  cancel: async (asked) => {
    const taken = [];
    for await (const part of await chat(asked, { stream: true })) {
      taken.push(part.choices[0].delta.content);
      if (taken.length === 2) break;
    }
    return taken;
  },
});
