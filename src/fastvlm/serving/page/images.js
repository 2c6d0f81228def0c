// Images on their way in: read, checked, and made small enough to send.

const SENT_AS_THEY_ARE = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);
const MOST_BYTES = 8 * 1024 * 1024;
const MOST_PIXELS = 4096; // of the longer side
const SCALED_TO = 2048;

export class BrokenImage extends Error {}

/** An image of a file: its name, its data URL, and whether it was scaled down. */
export async function readImage(file) {
  const name = file.name || "pasted image";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new BrokenImage(`“${name}” can’t be read as an image.`);
  }
  try {
    const longer = Math.max(bitmap.width, bitmap.height);
    const large = file.size > MOST_BYTES || longer > MOST_PIXELS;
    if (!large && SENT_AS_THEY_ARE.has(file.type)) {
      return { name, url: await dataUrl(file), scaled: false };
    }
    const scale = large ? Math.min(1, SCALED_TO / longer) : 1;
    return { name, url: drawn(bitmap, scale, large ? "image/jpeg" : "image/png"), scaled: scale < 1 };
  } finally {
    bitmap.close();
  }
}

/** What a video shows now, as an image. */
export function photograph(video) {
  const source = { width: video.videoWidth, height: video.videoHeight };
  const scale = Math.min(1, SCALED_TO / Math.max(source.width, source.height));
  return { name: "photo", url: drawn(video, scale, "image/jpeg", source), scaled: false };
}

function drawn(source, scale, type, size = source) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(size.width * scale);
  canvas.height = Math.round(size.height * scale);
  const context = canvas.getContext("2d");
  if (type === "image/jpeg") { // which knows no transparency, and would make it black
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(type, 0.92);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new BrokenImage(`“${file.name}” can’t be read.`));
    reader.readAsDataURL(file);
  });
}

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

/** Take files that are dropped or pasted anywhere on the page. */
export function receiveFiles(receive) {
  let depth = 0; // of elements that the pointer has entered while it drags
  const show = (on) => document.body.classList.toggle("dragging", on);
  document.addEventListener("dragenter", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth += 1;
    show(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!carriesFiles(event)) return;
    depth = Math.max(0, depth - 1);
    show(depth > 0);
  });
  document.addEventListener("dragover", (event) => {
    if (carriesFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth = 0;
    show(false);
    receive([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    receive(files);
  });
}
