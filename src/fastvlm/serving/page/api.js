// The server's interface: its models, and replies as streams of server-sent events.

const KEY = "fastvlm.key";

/** What went wrong. `kind` is `lost`, `busy`, `key` or `refused`. */
export class ServerError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

// Some browsers have no session storage in private windows: the key then lasts as long as the page.
let key = null;

export function keepKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // kept in `key` alone
  }
}

function currentKey() {
  try {
    return key ?? sessionStorage.getItem(KEY);
  } catch {
    return key;
  }
}

export const hasKey = () => Boolean(currentKey());

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const bearer = currentKey();
  if (bearer) headers.Authorization = `Bearer ${bearer}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("lost", "The server can’t be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? "";
  } catch {
    // a proxy's own page of error, which says less than its status
  }
  if (response.status === 401) return new ServerError("key", message || "The server asks for an API key.");
  if (response.status === 503) {
    const wait = Number.parseInt(response.headers.get("Retry-After"), 10);
    return new ServerError("busy", "The server is busy.", Number.isNaN(wait) ? null : wait);
  }
  if (response.status === 413) return new ServerError("refused", message || "The images are too large for the server.");
  return new ServerError("refused", message || `The server answered with status ${response.status}.`);
}

/** The models, with what each of them offers. */
export async function listModels() {
  const response = await request("v1/models");
  let data;
  try {
    ({ data } = await response.json());
  } catch {
    throw new ServerError("lost", "The server’s answer can’t be read.");
  }
  return data.map((model) => ({
    id: model.id,
    strategies: model.fastvlm?.strategies ?? ["autoregressive"],
    defaultStrategy: model.fastvlm?.default_strategy ?? "autoregressive",
    imageSizes: model.fastvlm?.image_sizes ?? [],
    images: model.fastvlm?.images ?? true,
    maxImages: model.fastvlm?.max_images ?? 8,
  }));
}

/** The chunks of a reply, as they arrive. */
export async function* streamReply(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      return_drafted: true,
    }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("lost", "The server’s answer can’t be read.");
    }
    if (chunk.error) throw new ServerError("refused", chunk.error.message || "The server gave up.");
    yield chunk;
  }
  throw new ServerError("lost", "The connection to the server was lost.");
}

/** The data of each server-sent event in a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("lost", "The connection to the server was lost.");
      }
      if (part.done) return;
      rest += part.value;
      const complete = rest.split(/\r?\n\r?\n/);
      rest = complete.pop();
      for (const event of complete) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    // Also where the reader of the events stops early: the connection is closed with it.
    reader.cancel().catch(() => {});
  }
}
