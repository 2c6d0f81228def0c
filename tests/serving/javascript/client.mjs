// Asks a server by the official client, and writes what came as JSON.
//   node client.mjs ADDRESS MODEL IMAGE_URL PROMPT   (openai is found from the working directory)

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const found = createRequire(join(process.cwd(), "index.js")).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(found));
const [address, model, url, prompt] = process.argv.slice(2);
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
const models = [];
for await (const one of client.models.list()) models.push(one.id);
const logprobs = await create({ ...greedy, logprobs: true, top_logprobs: 2 });
const form = await create({
  ...greedy,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "a", schema } },
});

console.log(
  JSON.stringify({
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
  }),
);
