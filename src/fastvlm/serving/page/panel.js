// The view of one reply: its text, its figures and a button to copy it.

import { count, element, seconds, strategyName } from "./dom.js";

const ENDS = { length: ", the maximum", aborted: ", then stopped" };

export class Panel {
  #figures = {};
  #body = element("div", { className: "reply", tabIndex: -1 });
  #state = element("p", { className: "state" });
  #copy = element("button", { type: "button", className: "quiet small", textContent: "Copy", hidden: true });
  #timer = null;
  #text = "";

  constructor(strategy, waits) {
    this.ordinary = strategy === "autoregressive";
    const title = this.ordinary ? "Ordinary" : "Speculative";
    const name = this.ordinary ? null : element("span", { className: "strategy" }, strategyName(strategy));
    const heading = element("h3", {}, title);
    this.#copy.setAttribute("aria-label", `Copy the ${title.toLowerCase()} reply`);
    this.#copy.addEventListener("click", () => this.#copyText());
    const list = element("dl", { className: "figures" });
    for (const [key, label] of [["first", "First token"], ["speed", "Tokens/s"], ["total", "Total"]]) {
      this.#figures[key] = element("dd", {}, "–");
      list.append(element("div", {}, element("dt", {}, label), this.#figures[key]));
    }
    this.element = element("section", { className: "panel" },
      element("div", { className: "panel-head" }, heading, name, this.#copy), list, this.#body, this.#state);
    this.element.setAttribute("aria-label", `${title} decoding`);
    this.element.dataset.kind = this.ordinary ? "ordinary" : "speculative";
    if (waits) this.#state.textContent = "Waits for the other to finish.";
  }

  begin(clock) {
    this.element.dataset.phase = "running";
    this.#body.setAttribute("aria-busy", "true");
    this.#state.textContent = "";
    const show = () => this.#showFigures(clock);
    show();
    this.#timer = setInterval(show, 100);
  }

  piece(text, drafted) {
    this.#text += text;
    for (const part of text.split(/(\s+)/)) { // spaces take no colour
      if (!part) continue;
      const word = drafted && part.trim() !== "";
      if (word && this.#body.lastChild?.className === "drafted") this.#body.lastChild.append(part);
      else this.#body.append(word ? element("span", { className: "drafted" }, part) : part);
    }
  }

  end(result) {
    clearInterval(this.#timer);
    this.element.dataset.phase = result.error ? "failed" : "done";
    this.#body.removeAttribute("aria-busy");
    this.#copy.hidden = !this.#text;
    this.#showFigures(result.clock);
    this.#state.replaceChildren(...describe(result).map((line) => element("span", {}, line)));
  }

  /** The other reply was stopped or not to be had, so this one is not asked for. */
  skip() {
    this.element.remove();
  }

  get empty() {
    return !this.#text;
  }

  #showFigures(clock) {
    const { first, speed, total } = this.#figures;
    first.textContent = clock.toFirst === null ? "–" : seconds(clock.toFirst);
    speed.textContent = clock.speed === null ? "–" : clock.speed.toFixed(1);
    total.textContent = seconds(clock.total);
  }

  async #copyText() {
    const copied = await copyText(this.#text);
    this.#copy.textContent = copied ? "Copied" : "Press Ctrl + C";
    if (!copied) getSelection().selectAllChildren(this.#body);
    setTimeout(() => { this.#copy.textContent = "Copy"; }, 2000);
  }
}

/** What there is to say below a reply. */
function describe({ finish, usage, clock }) {
  const lines = [];
  if (clock.tokens) lines.push(count(clock.tokens, "token") + (ENDS[finish] ?? ""));
  else if (finish === "aborted") lines.push("Stopped before the reply began");
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    lines.push(`prompt ${usage.prompt_tokens}` + (cached ? `, ${cached} of it cached` : ""));
  }
  return lines;
}

// The clipboard is for pages that are served securely, which one in the same house may not be.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
