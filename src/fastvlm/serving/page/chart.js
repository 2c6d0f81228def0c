// Acceptance by position, drawn as bars.

import { element, svg } from "./dom.js";

const HEIGHT = 96;
const LABELS = 16; // below the bars
const VALUES = 14; // above them
const EDGE = 8; // beside them, for labels wider than a bar

/** How often each position of a draft was proposed and accepted. */
export function acceptanceByPosition(accepted, proposed) {
  const positions = Math.max(0, ...proposed);
  return Array.from({ length: positions }, (_, index) => {
    const tried = proposed.filter((length) => length > index).length;
    const kept = accepted.filter((length) => length > index).length;
    return { position: index + 1, tried, kept, rate: tried ? kept / tried : 0 };
  });
}

/** A figure of it, or null where nothing was proposed. */
export function acceptanceChart(accepted, proposed) {
  const bars = acceptanceByPosition(accepted, proposed);
  if (!bars.length) return null;
  const step = bars.length > 12 ? 12 : 34; // 24 positions fit a phone
  const width = bars.length * step + 2 * EDGE;
  const floor = HEIGHT - LABELS;
  const room = floor - VALUES;
  const every = bars.length > 12 ? 4 : 1; // labels that would touch are left out
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img",
    "aria-label": `Drafted tokens accepted by position: ${bars.map(spoken).join(", ")}.`,
  });
  for (const { position, tried, kept, rate } of bars) {
    const middle = EDGE + (position - 0.5) * step;
    const thick = Math.min(20, step * 0.6);
    const group = svg("g", {}, svg("title", {}, `Position ${position}: ${kept} of ${tried} accepted`));
    group.append(
      svg("rect", { class: "bar-ground", x: middle - thick / 2, y: VALUES, width: thick, height: room, rx: 2 }),
      svg("rect", {
        class: "bar-value", x: middle - thick / 2, y: floor - rate * room, width: thick, height: rate * room, rx: 2,
      }),
    );
    if (position === 1 || position % every === 0) {
      group.append(
        svg("text", { x: middle, y: VALUES - 4 }, `${Math.round(rate * 100)}`),
        svg("text", { x: middle, y: HEIGHT - 2 }, `${position}`),
      );
    }
    drawing.append(group);
  }
  drawing.append(svg("line", { class: "bar-axis", x1: EDGE, x2: width - EDGE, y1: floor, y2: floor }));
  return element("figure", { className: "chart" },
    element("figcaption", {}, "Accepted by position in the draft, %"), drawing);
}

const spoken = ({ position, rate }) => `${position}, ${Math.round(rate * 100)}%`;
