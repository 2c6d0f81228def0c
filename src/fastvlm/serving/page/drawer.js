// The settings: beside the conversation where there is room, over it where there is none.

import { byId } from "./dom.js";

const WIDE = "(min-width: 1000px)";

export function setUpDrawer() {
  const toggle = byId("settings-toggle");
  const panel = byId("settings");
  const wide = matchMedia(WIDE);

  const open = (on) => {
    panel.hidden = !on;
    toggle.setAttribute("aria-expanded", `${on}`);
    document.body.classList.toggle("settings-open", on);
  };
  const close = () => {
    open(false);
    toggle.focus();
  };

  open(wide.matches);
  wide.addEventListener("change", () => open(wide.matches));
  toggle.addEventListener("click", () => {
    open(panel.hidden);
    if (!panel.hidden && !wide.matches) byId("settings-close").focus();
  });
  byId("settings-close").addEventListener("click", close);
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || wide.matches) return;
    event.stopPropagation();
    close();
  });
}
