// The dialog that asks for an API key.

import { hasKey, keepKey } from "./api.js";
import { byId } from "./dom.js";

/** Ask for a key and keep it; whether one was given. */
export function askForKey() {
  const dialog = byId("key");
  const form = byId("key-form");
  const input = byId("key-input");
  byId("key-wrong").hidden = !hasKey();
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const submitted = () => {
      keepKey(input.value.trim());
      dialog.returnValue = "given";
    };
    form.addEventListener("submit", submitted, { once: true });
    byId("key-cancel").onclick = () => dialog.close("");
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submitted);
      resolve(dialog.returnValue === "given");
    }, { once: true });
  });
}
