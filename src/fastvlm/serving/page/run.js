// One reply: its stream, its clock and what came of it.

import { streamReply } from "./api.js";

/** The times and tokens of one reply, while it is written and after. */
export class Clock {
  #started = performance.now();
  #first = null;
  #last = null;
  #ended = null;
  tokens = 0;

  token(count) {
    if (!count) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.tokens += count;
  }

  end() {
    this.#ended ??= performance.now();
  }

  /** Milliseconds to the first token, or null before it. */
  get toFirst() {
    return this.#first === null ? null : this.#first - this.#started;
  }

  get total() {
    return (this.#ended ?? performance.now()) - this.#started;
  }

  /** Tokens a second after the first, which waits for the prompt; null for fewer than two. */
  get speed() {
    if (this.tokens < 2 || this.#last <= this.#first) return null;
    return (this.tokens - 1) / ((this.#last - this.#first) / 1000);
  }
}

/**
 * Ask for a reply and hand its pieces to `view`, which has `begin(clock)`, `piece(text, drafted)` and
 * `end(result)`. The result has `text`, `finish`, `usage`, `cycles`, `clock` and `error`; `finish` is
 * `aborted` for a reply that was stopped, and null for one that failed.
 */
export async function run(body, signal, view) {
  const clock = new Clock();
  const result = { text: "", finish: null, usage: null, cycles: null, clock, error: null };
  view.begin(clock);
  try {
    for await (const chunk of streamReply(body, signal)) {
      const choice = chunk.choices?.[0];
      if (choice) {
        const text = choice.delta?.content ?? "";
        const drafted = choice.drafted ?? [];
        clock.token(drafted.length || (text ? 1 : 0));
        result.text += text;
        result.finish = choice.finish_reason ?? result.finish;
        if (text) view.piece(text, drafted.length > 0 && drafted.every(Boolean));
      }
      if (chunk.usage) {
        result.usage = chunk.usage;
        clock.tokens = chunk.usage.completion_tokens ?? clock.tokens;
      }
      if (chunk.fastvlm) {
        result.cycles = {
          accepted: chunk.fastvlm.accepted_per_cycle ?? [],
          proposed: chunk.fastvlm.proposed_per_cycle ?? [],
        };
      }
    }
    result.finish ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") result.finish = "aborted";
    else {
      result.finish = null;
      result.error = error;
    }
  }
  clock.end();
  view.end(result);
  return result;
}
