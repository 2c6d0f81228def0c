// The settings: what the form offers for a model, and what it says.

import { byId, strategyName } from "./dom.js";

const ORDINARY = "autoregressive";
const STORED = "fastvlm.settings";
const KEPT = ["compare", "together", "draft-length", "max-tokens", "temperature", "seed", "stop-strings"];

export class Settings {
  #form = byId("settings-form");
  #sizes = [];

  constructor() {
    this.#restore();
    this.#form.addEventListener("input", () => {
      this.#describe();
      this.#store();
    });
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#describe();
  }

  /** Offer what a model has. */
  offer(model) {
    const before = byId("strategy").value;
    const options = model.strategies.map((id) => new Option(sentence(strategyName(id)), id));
    byId("strategy").replaceChildren(...options);
    const chosen = model.strategies.includes(before) ? before : speculativeFirst(model);
    byId("strategy").value = chosen;
    this.#sizes = model.imageSizes;
    byId("image-fields").hidden = !this.#sizes.length || !model.images;
    byId("image-size").max = this.#sizes.length;
    byId("image-size").value = 0;
    this.#describe();
  }

  /** What is chosen; null where the server decides. */
  get chosen() {
    const number = (id) => Number(byId(id).value);
    const seed = byId("seed").value.trim();
    const strategy = byId("strategy").value || ORDINARY;
    return {
      strategy,
      compare: strategy !== ORDINARY && byId("compare").checked,
      together: byId("together").checked,
      draftLength: number("draft-length") || null,
      maxTokens: number("max-tokens"),
      temperature: number("temperature"),
      seed: /^\d{1,9}$/.test(seed) ? Number(seed) : null,
      stop: stopStrings(byId("stop-strings").value),
      imageSize: this.#sizes[number("image-size") - 1] ?? null,
    };
  }

  #describe() {
    const { strategy, compare, draftLength, maxTokens, temperature, imageSize } = this.chosen;
    const values = {
      "draft-length": draftLength ? `${draftLength}` : "default",
      "max-tokens": `${maxTokens}`,
      temperature: temperature ? temperature.toFixed(1) : "0, greedy",
      "image-size": imageSize ? `${imageSize} px` : "default",
    };
    for (const [id, value] of Object.entries(values)) {
      this.#form.querySelector(`output[for="${id}"]`).value = value;
      byId(id).setAttribute("aria-valuetext", value);
    }
    byId("compare").disabled = strategy === ORDINARY;
    byId("together").disabled = !compare;
    byId("draft-length").disabled = strategy === ORDINARY;
    byId("seed-field").hidden = temperature === 0;
  }

  #store() {
    const values = KEPT.map((id) => [id, byId(id).type === "checkbox" ? byId(id).checked : byId(id).value]);
    try {
      sessionStorage.setItem(STORED, JSON.stringify(Object.fromEntries(values)));
    } catch {
      // without storage, settings last as long as the page
    }
  }

  #restore() {
    try {
      const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
      for (const [id, value] of Object.entries(stored)) {
        if (KEPT.includes(id)) byId(id)[byId(id).type === "checkbox" ? "checked" : "value"] = value;
      }
    } catch {
      // what is stored is of no use, and is replaced at the next change
    }
  }
}

/** The part of a request that the settings decide, for one of the strategies. */
export function requestOptions(chosen, strategy, seed) {
  return {
    strategy,
    max_tokens: chosen.maxTokens,
    temperature: chosen.temperature,
    ...(chosen.temperature > 0 && { seed }),
    ...(chosen.stop.length > 0 && { stop: chosen.stop }),
    ...(chosen.imageSize && { image_size: chosen.imageSize }),
    ...(chosen.draftLength && strategy !== ORDINARY && { num_speculative_tokens: chosen.draftLength }),
  };
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const stopStrings = (text) => text.split("\n").filter((line) => line !== "").slice(0, 4)
  .map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));

// A model without a draft of its own decodes in the ordinary way by default, which compares nothing.
function speculativeFirst({ strategies, defaultStrategy }) {
  if (defaultStrategy !== ORDINARY) return defaultStrategy;
  return strategies.includes("prompt-lookup") ? "prompt-lookup" : ORDINARY;
}
