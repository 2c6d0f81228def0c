// Where a question is typed and images are added.

import { setUpCamera } from "./camera.js";
import { byId, count, element, tell } from "./dom.js";
import { readImage, receiveFiles } from "./images.js";

const DRAFT = "fastvlm.question";

export class Composer {
  #images = [];
  #question = byId("question");
  #alert = byId("composer-alert");
  #model = null;
  #running = false;
  #aboutQuestion = false; // whether the alert ends when something is typed
  #imagesBefore;

  /** `ask(text, images)` is called to ask, `stop()` to stop; `imagesBefore()` counts those of earlier turns. */
  constructor({ ask, stop, imagesBefore }) {
    this.#imagesBefore = imagesBefore;
    const submit = () => {
      const text = this.#question.value.trim();
      if (this.#running) return;
      if (!this.#model) this.#say("There is no model to ask yet.");
      else if (!text) {
        this.#say("Type a question first.");
        this.#aboutQuestion = true;
      } else ask(text, this.#images);
      this.#focus();
    };
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.#question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      if (matchMedia("(pointer: coarse)").matches) return; // phones have no Shift + Enter
      event.preventDefault();
      submit();
    });
    this.#question.addEventListener("input", () => {
      if (this.#aboutQuestion) this.#say();
      this.#fit();
      remember(this.#question.value);
    });
    byId("stop").addEventListener("click", stop);
    for (const id of ["choose", "welcome-choose"]) byId(id).addEventListener("click", () => byId("files").click());
    for (const id of ["files", "capture"]) {
      byId(id).addEventListener("change", ({ target }) => {
        this.receive([...target.files]);
        target.value = ""; // so that the same file can be chosen again
      });
    }
    setUpCamera(byId("take"), byId("capture"), (image) => this.#add(image));
    receiveFiles((files) => this.receive(files));
    this.#question.value = remembered();
    this.#fit();
  }

  set model(model) {
    this.#model = model;
    const images = model?.images ?? true;
    for (const id of ["choose", "take"]) byId(id).hidden = !images;
    byId("welcome-choose").hidden = !images;
  }

  set running(running) {
    const focused = [byId("ask"), byId("stop")].includes(document.activeElement);
    this.#running = running;
    byId("ask").hidden = running;
    byId("stop").hidden = !running;
    if (focused) byId(running ? "stop" : "ask").focus(); // a button that hides takes the focus with it
  }

  /** Empty it, or fill it with a question and its images. */
  fill(text = "", images = []) {
    this.#question.value = text;
    this.#images = [...images];
    remember(text);
    this.#say();
    this.#fit();
    this.#show();
    this.#focus();
  }

  // The keyboard of a phone would cover what is to be seen.
  #focus() {
    if (matchMedia("(pointer: coarse)").matches) this.#question.blur();
    else this.#question.focus();
  }

  async receive(files) {
    this.#say();
    if (this.#model && !this.#model.images) {
      this.#say("This model takes no images.");
      return;
    }
    const problems = [];
    for (const file of files) {
      try {
        const image = await readImage(file);
        if (!this.#add(image)) return;
        if (image.scaled) problems.push(`“${image.name}” is large and was scaled down.`);
      } catch (error) {
        problems.push(error.message);
      }
    }
    if (problems.length) this.#say(problems.join(" "));
  }

  #add(image) {
    const most = this.#model?.maxImages ?? Infinity;
    if (this.#images.length + this.#imagesBefore() >= most) {
      this.#say(`A conversation can have ${count(most, "image")} at most.`);
      return false;
    }
    this.#images.push(image);
    this.#show();
    this.#focus();
    return true;
  }

  #show() {
    const list = byId("attachments");
    list.replaceChildren(...this.#images.map((image, index) => {
      const remove = element("button", { type: "button", className: "remove", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${image.name}`);
      remove.addEventListener("click", () => {
        this.#images.splice(index, 1);
        this.#show();
        this.#question.focus();
      });
      return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
    }));
    list.hidden = !this.#images.length;
    document.body.classList.toggle("has-images", this.#images.length > 0);
  }

  #say(...message) {
    this.#aboutQuestion = false;
    tell(this.#alert, ...message);
  }

  #fit() {
    this.#question.style.height = "auto";
    this.#question.style.height = `${Math.min(this.#question.scrollHeight, 200)}px`;
  }
}

function remember(text) {
  try {
    sessionStorage.setItem(DRAFT, text);
  } catch {
    // without storage, a question lasts as long as the page
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    return "";
  }
}
