"""How a server runs: where it listens, whom it answers, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastvlm.functional.options import Option


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server runs.

    Args:
        host: The address to listen on. Other addresses than this machine's own need an API key.
        port: The port to listen on; 0 for a free one.
        api_key_file: A file with the API keys that clients may use, one a line. None for those in
            the environment variable `FASTVLM_API_KEY`, separated by commas, or no key at all.
        served_name: The model's name in the API; None for its directory's.
        max_waiting: Requests that may wait for a slot; more are answered with 503.
        max_body_bytes: The largest request body, in bytes.
        max_images: The most images in a request.
        image_folder: A folder whose images clients may name by `file://` URLs; None for none.
        request_seconds: The longest that a request may take, in seconds.
    """

    host: Annotated[str, Option("The address to listen on.", "HOST")] = "127.0.0.1"
    port: Annotated[int, Option("The port to listen on; 0: a free one.", "N", 0, 65535)] = 8000
    api_key_file: Annotated[
        Path | None,
        Option(
            "A file of API keys, one a line; else they are in FASTVLM_API_KEY.",
            "FILE",
        ),
    ] = None
    served_name: Annotated[
        str | None, Option("The model's name in the API, if not that of its directory.", "NAME")
    ] = None
    max_waiting: Annotated[
        int, Option("Requests that may wait for a slot; more get 503.", "N", 0, 100_000)
    ] = 64
    max_body_bytes: Annotated[int, Option("The largest request body.", "BYTES", 1024, 2**31)] = (
        64 * 2**20
    )
    max_images: Annotated[int, Option("The most images in a request.", "N", 0, 1000)] = 16
    image_folder: Annotated[
        Path | None,
        Option("A folder whose images clients may name by file:// URLs.", "DIR"),
    ] = None
    request_seconds: Annotated[
        float, Option("The longest that a request may take.", "S", 1, 86_400)
    ] = 600.0
