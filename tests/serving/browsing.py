"""A browser, and what a person hands a page."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
PATIENCE = 10_000  # milliseconds, for a machine that is busy with something else
PHONE = {"width": 360, "height": 740}

# A file as the page receives it from the desktop or from another window.
TRANSFER = """({ base64, name, type }) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""


def picture(*, colour: str = "teal", size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def upload(name: str = "picture.png", data: bytes | None = None) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": picture() if data is None else data}


@contextmanager
def browsing() -> Iterator[Any]:
    """Open a browser; skip the test where there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="The page is tested with playwright."
    )
    named = os.environ.get("FASTVLM_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("No Chromium; FASTVLM_CHROMIUM names one that is not on the path.")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=CAMERA)
        yield browser
        browser.close()


def dropped(page: Any, data: bytes, name: str, kind: str) -> Any:
    encoded = base64.b64encode(data).decode()
    return page.evaluate_handle(TRANSFER, {"base64": encoded, "name": name, "type": kind})
