// Scrolling along with a reply that grows, until the reader scrolls back.

import { byId } from "./dom.js";

const EVERY = 150; // milliseconds

/** Keep the growing end of an article in view; returns the function that ends it. */
export function follow(article) {
  let following = true;
  let before = window.scrollY;
  const scrolled = () => {
    if (window.scrollY < before - 2) following = false;
    else if (window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 4) following = true;
    before = window.scrollY;
  };
  const keepUp = () => {
    if (!following) return;
    const growing = article.querySelectorAll('[data-phase="running"]');
    const end = (growing[growing.length - 1] ?? article).getBoundingClientRect().bottom;
    const hidden = end - byId("composer").getBoundingClientRect().top + 20;
    if (hidden > 0) window.scrollBy(0, hidden);
  };
  addEventListener("scroll", scrolled, { passive: true });
  const timer = setInterval(keepUp, EVERY);
  return () => {
    clearInterval(timer);
    keepUp();
    removeEventListener("scroll", scrolled);
  };
}
