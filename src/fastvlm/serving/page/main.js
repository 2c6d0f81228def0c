// The page: connects to the server, and has questions answered.

import { listModels } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { announce, byId, element, tell } from "./dom.js";
import { setUpDrawer } from "./drawer.js";
import { follow } from "./follow.js";
import { askForKey } from "./key.js";
import { run } from "./run.js";
import { Settings, requestOptions } from "./settings.js";

const conversation = new Conversation();
const settings = new Settings();
let models = [];
let model = null;
let abort = null; // of the turn that is being answered

const composer = new Composer({
  ask(text, images) {
    const turn = conversation.add(text, images);
    composer.fill();
    answer(turn);
  },
  stop: () => abort?.abort(),
  imagesBefore: () => conversation.images,
});

async function answer(turn) {
  if (abort) {
    announce("Another reply is being written. Stop it first.");
    return;
  }
  const controller = new AbortController();
  abort = controller;
  composer.running = true;
  announce("Asked.");
  const chosen = settings.chosen;
  const seed = chosen.seed ?? crypto.getRandomValues(new Uint32Array(1))[0] % 2 ** 30;
  const strategies = chosen.compare ? ["autoregressive", chosen.strategy] : [chosen.strategy];
  const panels = turn.open(strategies, chosen.together);
  turn.element.scrollIntoView({ block: "start" });
  const unfollow = follow(turn.element);
  const messages = conversation.messages(turn);
  // What one of two has computed is not the other's: their clocks are compared.
  const own = chosen.compare ? { cache: false } : {};
  const start = (index) => run(
    { model: model.id, messages, ...own, ...requestOptions(chosen, strategies[index], seed) },
    controller.signal, panels[index],
  );

  let results = [];
  if (chosen.together) results = await Promise.all(strategies.map((_, index) => start(index)));
  else {
    for (const index of strategies.keys()) {
      if (results.some(({ error }) => error) || controller.signal.aborted) panels[index].skip();
      else results.push(await start(index));
    }
  }

  abort = null;
  composer.running = false;
  if (conversation.has(turn)) await settle(turn, strategies, results);
  unfollow();
}

async function settle(turn, strategies, results) {
  const error = results.find((result) => result.error)?.error;
  if (error?.kind === "key" && await askForKey()) {
    answer(turn);
    return;
  }
  if (error) {
    turn.fail(error, () => answer(turn), () => {
      conversation.remove(turn);
      composer.fill(turn.text, turn.images);
    });
    return;
  }
  turn.reply = results.at(-1).text || results[0].text || null;
  turn.conclude(strategies.slice(0, results.length), results);
}

async function connect() {
  tell(byId("notice"));
  try {
    models = await listModels();
    if (!models.length) throw new Error("The server has no model.");
  } catch (error) {
    if (error.kind === "key" && await askForKey()) {
      connect();
      return;
    }
    const again = element("button", { type: "button", className: "quiet", textContent: "Try again" });
    again.addEventListener("click", connect);
    tell(byId("notice"), element("span", {}, error.message), again);
    byId("model").replaceChildren(new Option("Not connected"));
    return;
  }
  byId("model").replaceChildren(...models.map(({ id }) => new Option(id.split("/").at(-1), id)));
  byId("model").disabled = models.length === 1;
  choose();
}

function choose() {
  model = models.find(({ id }) => id === byId("model").value);
  settings.offer(model);
  composer.model = model;
}

byId("model").addEventListener("change", choose);
byId("new").addEventListener("click", () => {
  abort?.abort();
  conversation.clear();
  byId("question").focus();
  announce("New conversation.");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) abort?.abort();
});

setUpDrawer();
connect();
