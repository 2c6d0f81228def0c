// One turn: a question with its images, the replies, and how they compare.

import { acceptanceChart } from "./chart.js";
import { announce, count, element } from "./dom.js";
import { Panel } from "./panel.js";

export class Turn {
  reply = null; // what the history has of it
  #outcome = element("div", { className: "outcome" });
  #list = element("div", { className: "panels" });
  #panels = [];

  constructor(number, text, images) {
    this.text = text;
    this.images = images;
    const question = element("h2", { className: "question" }, text);
    const shown = images.map(({ name, url }, index) => element("li", {},
      element("img", { src: url, alt: `Image ${index + 1}: ${name}` })));
    this.element = element("article", { className: "turn" },
      images.length ? element("ul", { className: "turn-images" }, ...shown) : null,
      question, this.#list, this.#outcome);
    this.element.setAttribute("aria-label", `Turn ${number}`);
  }

  /** Make a panel for each strategy; where they run in turn, all but the first wait. */
  open(strategies, together) {
    this.#outcome.replaceChildren();
    this.#panels = strategies.map((strategy, index) => new Panel(strategy, index > 0 && !together));
    this.#list.replaceChildren(...this.#panels.map((panel) => panel.element));
    this.#list.classList.toggle("single", this.#panels.length === 1);
    return this.#panels;
  }

  /** Say how the replies compare, and how the drafts did. */
  conclude(strategies, results) {
    const last = results.at(-1);
    const parts = [];
    let said = "";
    if (results.length === 2) {
      const verdict = compare(...results);
      said = verdict.text;
      parts.push(element("p", { className: `verdict ${verdict.kind}` }, verdict.text));
    }
    const facts = [
      results.length === 2 ? speedup(...results) : null,
      strategies.at(-1) === "autoregressive" ? null : perPass(last),
    ].filter(Boolean);
    if (facts.length) {
      parts.push(element("dl", { className: "facts" }, ...facts.map(([value, label]) =>
        element("div", {}, element("dt", {}, label), element("dd", {}, value)))));
    }
    const words = element("div", { className: "outcome-words" }, ...parts);
    if (strategies.at(-1) !== "autoregressive" && last.text) words.append(legend());
    const chart = last.cycles && acceptanceChart(last.cycles.accepted, last.cycles.proposed);
    this.#outcome.replaceChildren(...[words, chart].filter((part) => part && part.hasChildNodes()));
    announce([last.text, said, ...facts.map(([value, label]) => `${value} ${label}`)].join(" \n"));
  }

  /** Say what went wrong, and offer to do something about it. */
  fail(error, retry, edit) {
    const message = error.retryAfter
      ? `The server is busy, and asks to wait ${count(error.retryAfter, "second")}.`
      : error.message;
    const again = element("button", { type: "button", className: "primary", textContent: "Try again" });
    again.addEventListener("click", retry);
    const change = element("button", { type: "button", className: "quiet", textContent: "Edit question" });
    change.addEventListener("click", edit);
    const failure = element("div", { className: "failure" }, element("p", {}, message), again, change);
    failure.setAttribute("role", "alert");
    for (const panel of this.#panels) if (panel.empty) panel.element.remove();
    this.#outcome.replaceChildren(failure);
  }
}

/** Whether two replies are the same, in words. */
export function compare(ordinary, speculative) {
  const finished = [ordinary, speculative].every(({ finish }) => finish === "stop" || finish === "length");
  const [a, b] = [[...ordinary.text], [...speculative.text]];
  const shorter = Math.min(a.length, b.length);
  let same = 0;
  while (same < shorter && a[same] === b[same]) same += 1;
  if (finished && same === a.length && same === b.length) {
    return { kind: "same", text: "Both replies are identical." };
  }
  if (!finished && same === shorter) {
    return { kind: "open", text: shorter ? "Stopped; identical as far as both go." : "Stopped before both replied." };
  }
  return { kind: "different", text: `The replies differ from character ${same + 1}.` };
}

function speedup(ordinary, speculative) {
  const [slow, fast] = [ordinary.clock.speed, speculative.clock.speed];
  if (!slow || !fast) return null;
  return [`${(fast / slow).toFixed(2)}×`, "the tokens per second"];
}

function perPass({ cycles }) {
  if (!cycles?.accepted.length) return null;
  const kept = cycles.accepted.reduce((sum, number) => sum + number, 0);
  return [(kept / cycles.accepted.length + 1).toFixed(2), "tokens per pass of the full model"];
}

const legend = () => element("p", { className: "legend" },
  element("span", { className: "drafted" }, "drafted and accepted"), " ",
  element("span", {}, "written by the full model"));
