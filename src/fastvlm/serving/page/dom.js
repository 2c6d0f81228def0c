// Small helpers to build and describe elements.

/** An element with properties and children: `element("p", { className: "hint" }, "Text")`. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** An SVG element with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Show a message in an element, or hide the element where there is none. */
export function tell(where, ...message) {
  where.replaceChildren(...message);
  where.hidden = message.length === 0;
}

/** Have a screen reader say it, without moving the focus. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  // A region that is emptied and filled in one step may be taken as unchanged.
  setTimeout(() => { region.textContent = text; }, 50);
}

export const seconds = (milliseconds) => {
  const value = milliseconds / 1000;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
};

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

const NAMES = {
  autoregressive: "ordinary",
  imitation: "imitation network",
  "early-exit": "early exit",
  "layer-skip": "layer skip",
  "prompt-lookup": "prompt lookup",
};

/** What people call a strategy. */
export const strategyName = (id) => NAMES[id] ?? id;
