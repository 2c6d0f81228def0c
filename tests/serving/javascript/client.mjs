// Asks a server by the official client, and writes what came as JSON.
//   node client.mjs WHAT ADDRESS MODEL IMAGE_URL PROMPT   (openai is found from the working directory)
// WHAT is one of the functions at the end.

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const found = createRequire(join(process.cwd(), "index.js")).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(found));
const [what, address, model, url, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });

const messages = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url } },
      { type: "text", text: prompt },
    ],
  },
];
const greedy = { model, messages, max_tokens: 20, temperature: 0 };
const sampled = { ...greedy, temperature: 0.7, seed: 5 };
const schema = {
  type: "object",
  properties: { number: { type: "integer" }, colour: { enum: ["red", "blue"] } },
  required: ["number", "colour"],
  additionalProperties: false,
};

async function streamed(options) {
  let text = "";
  let usage = null;
  const stream = await client.chat.completions.create({
    ...options,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function refused(options) {
  try {
    await client.chat.completions.create({ ...greedy, ...options });
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param };
  }
  return null;
}

const texts = (reply) => reply.choices.map((choice) => choice.message.content);
const create = (options) => client.chat.completions.create(options);

async function chats() {
  const models = [];
  for await (const one of client.models.list()) models.push(one.id);
  const logprobs = await create({ ...greedy, logprobs: true, top_logprobs: 2 });
  const form = await create({
    ...greedy,
    max_tokens: 200,
    response_format: { type: "json_schema", json_schema: { name: "a", schema } },
  });
  return {
    models,
    whole: texts(await create(greedy)),
    streamed: await streamed(greedy),
    sampled: texts(await create(sampled)),
    sampledStreamed: await streamed(sampled),
    choices: texts(await create({ ...sampled, n: 3 })),
    logprobs: logprobs.choices[0].logprobs.content.map((one) => one.logprob),
    form: JSON.parse(texts(form)[0]),
    refused: await refused({ temperature: 3 }),
    unknown: await refused({ model: "another" }),
  };
}

const weather = {
  name: "weather",
  description: "The weather of a place.",
  parameters: {
    type: "object",
    properties: { place: { enum: ["Rome", "Köln"] }, days: { type: "integer", maximum: 9 } },
    required: ["place", "days"],
    additionalProperties: false,
  },
};
const tools = [{ type: "function", function: weather }];
const calling = { model, messages, tools, tool_choice: "required", temperature: 0, max_tokens: 300 };

async function chatTools() {
  const { message, finish_reason: reason } = (await create(calling)).choices[0];
  const [call] = message.tool_calls;
  const deltas = [];
  for await (const chunk of await create({ ...calling, stream: true })) {
    deltas.push(...(chunk.choices[0].delta.tool_calls ?? []));
  }
  const named = { type: "function", function: { name: "weather" } };
  const helped = await client.chat.completions
    .stream({ ...calling, tool_choice: named })
    .finalChatCompletion();
  const answer = { role: "tool", tool_call_id: call.id, content: "Sunny." };
  const answers = message.tool_calls.map((one) => ({ ...answer, tool_call_id: one.id }));
  const follow = { model, messages: [...messages, message, ...answers], tools, temperature: 0 };
  return {
    reason,
    calls: message.tool_calls,
    deltas,
    named: helped.choices[0].message.tool_calls.map((one) => one.function),
    followed: texts(await create({ ...follow, max_tokens: 12 })),
    none: texts(await create({ ...greedy, tools, tool_choice: "none" })),
  };
}

const input = [
  {
    role: "user",
    content: [
      { type: "input_image", image_url: url, detail: "auto" },
      { type: "input_text", text: prompt },
    ],
  },
];
const responding = { model, input, max_output_tokens: 20, temperature: 0 };
const respond = (options) => client.responses.create(options);

async function events(options) {
  const found = [];
  for await (const event of await respond({ ...options, stream: true })) found.push(event);
  return found;
}

async function responses() {
  const text = await respond({ ...responding, input: prompt });
  const image = await respond(responding);
  const helped = await client.responses.stream(responding).finalResponse();
  return {
    text: text.output_text,
    image: image.output_text,
    status: image.status,
    helped: helped.output_text,
    events: await events(responding),
  };
}

async function responseTools() {
  const options = {
    ...responding,
    tools: [{ type: "function", ...weather, strict: true }],
    tool_choice: "required",
    max_output_tokens: 300,
  };
  const first = await respond(options);
  const outputs = first.output.map(({ call_id }) => ({
    type: "function_call_output",
    call_id,
    output: "Sunny.",
  }));
  const followed = await respond({
    ...options,
    input: [...input, ...first.output, ...outputs],
    tool_choice: "auto",
    max_output_tokens: 12,
  });
  return { calls: first.output, events: await events(options), followed: followed.output_text };
}

const asked = { chats, chatTools, responses, responseTools };
console.log(JSON.stringify(await asked[what]()));
