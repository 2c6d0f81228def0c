// The conversation: its turns on the page, and the messages that they make.

import { byId } from "./dom.js";
import { Turn } from "./turn.js";

export class Conversation {
  #turns = [];
  #list = byId("turns");

  add(text, images) {
    const turn = new Turn(this.#turns.length + 1, text, images);
    this.#turns.push(turn);
    this.#list.append(turn.element);
    byId("welcome").hidden = true;
    return turn;
  }

  remove(turn) {
    this.#turns = this.#turns.filter((other) => other !== turn);
    turn.element.remove();
    byId("welcome").hidden = this.#turns.length > 0;
  }

  clear() {
    this.#turns = [];
    this.#list.replaceChildren();
    byId("welcome").hidden = false;
  }

  has(turn) {
    return this.#turns.includes(turn);
  }

  /** How many images its turns show. */
  get images() {
    return this.#turns.reduce((sum, { images }) => sum + images.length, 0);
  }

  /** The messages up to a turn's question. Turns without a reply are left out. */
  messages(turn) {
    const before = this.#turns.slice(0, this.#turns.indexOf(turn)).filter(({ reply }) => reply);
    return [
      ...before.flatMap((earlier) => [asked(earlier), { role: "assistant", content: earlier.reply }]),
      asked(turn),
    ];
  }
}

const asked = ({ text, images }) => ({
  role: "user",
  content: [
    ...images.map(({ url }) => ({ type: "image_url", image_url: { url } })),
    { type: "text", text },
  ],
});
