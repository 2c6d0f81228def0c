// The camera: a dialog with its picture, or the phone's own camera where that serves better.

import { byId, tell } from "./dom.js";
import { photograph } from "./images.js";

/** Have the button `take` hand a photo to `receive`; `capture` is the file input of phones. */
export function setUpCamera(take, capture, receive) {
  const dialog = byId("camera");
  const video = byId("camera-video");
  const shoot = byId("camera-shoot");
  let stream = null;

  const end = () => {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    video.srcObject = null;
    shoot.disabled = true;
  };

  take.addEventListener("click", async () => {
    // A page that isn't served securely gets no stream; a phone's own camera focuses and zooms.
    if (!navigator.mediaDevices?.getUserMedia || matchMedia("(pointer: coarse)").matches) {
      capture.click();
      return;
    }
    tell(byId("camera-error"));
    dialog.showModal();
    try {
      const asked = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment", width: { ideal: 1920 } },
      });
      stream = asked;
      if (!dialog.open) { // cancelled while the browser asked for permission
        end();
        return;
      }
      video.srcObject = asked;
    } catch (error) {
      tell(byId("camera-error"), reason(error));
    }
  });

  video.addEventListener("loadeddata", () => {
    shoot.disabled = false;
    shoot.focus();
  });
  shoot.addEventListener("click", () => {
    receive(photograph(video));
    dialog.close();
  });
  byId("camera-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    end();
    take.focus();
  });
}

function reason(error) {
  if (error.name === "NotAllowedError") return "The browser was not allowed to use the camera.";
  if (error.name === "NotFoundError") return "No camera was found.";
  return "The camera can’t be used; another program may be using it.";
}
