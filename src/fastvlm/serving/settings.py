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
        max_image_bytes: The largest image, in bytes as it is sent, fetched or read.
        max_image_pixels: The most pixels of a request's images together.
        max_image_tokens: The most visual tokens of a request; None for no limit but the model's.
        image_folder: A folder whose images clients may name by `file://` URLs; None for none.
        image_hosts: Hosts that images are fetched from, separated by commas, such as
            `images.example.com` or `example.com:8443`; None for none.
        image_seconds: The longest that fetching an image may take, in seconds.
        request_seconds: The longest that a request may take, in seconds.
        body_seconds: The longest that a request's body may take to arrive, in seconds.
        drain_seconds: How long requests may go on after a signal to stop, in seconds.
        cors_origins: Origins whose pages may use the server, separated by commas; `*` for all.
        tls_cert: A certificate chain in PEM format, to serve HTTPS; None for HTTP.
        tls_key: The certificate's private key.
        log_json: Whether each line of the log is a JSON object.
        keep_replies: A folder to keep replies in for the training of the next draft; None for none.
        draft_refresh: How often to look for a new draft in the draft's directory, in seconds; 0 for
            never.
    """

    host: Annotated[str, Option("The address to listen on.", "HOST")] = "127.0.0.1"
    port: Annotated[int, Option("The port to listen on; 0: a free one.", "N", 0, 65535)] = 8000
    api_key_file: Annotated[
        Path | None,
        Option("A file of API keys, one a line; else they are in FASTVLM_API_KEY.", "FILE"),
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
    max_images: Annotated[
        int, Option("The most images in a request.", "N", 0, 1000, "--limit-images")
    ] = 16
    max_image_bytes: Annotated[int, Option("The largest image.", "BYTES", 1, 2**29)] = 20 * 2**20
    max_image_pixels: Annotated[
        int, Option("The most pixels of a request's images together.", "N", 1, 10**10)
    ] = 100_000_000
    max_image_tokens: Annotated[
        int | None, Option("The most visual tokens of a request.", "N", 0, 10**9)
    ] = None
    image_folder: Annotated[
        Path | None,
        Option("A folder whose images clients may name by file:// URLs.", "DIR"),
    ] = None
    image_hosts: Annotated[
        str | None,
        Option("Hosts that images are fetched from, separated by commas: a.org,b.org:8443", "LIST"),
    ] = None
    image_seconds: Annotated[
        float, Option("The longest that fetching an image may take.", "S", 0.1, 3600)
    ] = 10.0
    request_seconds: Annotated[
        float, Option("The longest that a request may take.", "S", 1, 86_400)
    ] = 600.0
    body_seconds: Annotated[
        float, Option("The longest that a request's body may take to arrive.", "S", 0.1, 86_400)
    ] = 60.0
    drain_seconds: Annotated[
        float, Option("How long requests may go on after SIGTERM or Ctrl-C.", "S", 0, 86_400)
    ] = 30.0
    cors_origins: Annotated[
        str | None,
        Option(
            "Origins whose pages may use the server, separated by commas; *: all.",
            "LIST",
        ),
    ] = None
    tls_cert: Annotated[
        Path | None, Option("A certificate chain (PEM), to serve HTTPS.", "FILE")
    ] = None
    tls_key: Annotated[Path | None, Option("The certificate's private key (PEM).", "FILE")] = None
    log_json: Annotated[
        bool, Option("Write the log as one JSON object a line.", flag="--log-json")
    ] = False
    keep_replies: Annotated[
        Path | None,
        Option(
            "Keep replies in this folder, with hashes of their prompts and without their images, to"
            " train the next draft on.",
            "DIR",
        ),
    ] = None
    draft_refresh: Annotated[
        float,
        Option("Look so often for a new draft in the draft's directory; 0: never.", "S", 0, 86_400),
    ] = 0.0


def listed(values: str | None) -> list[str]:
    """Return the values of a list, which are separated by commas."""
    return [one for one in map(str.strip, (values or "").split(",")) if one]
