"""`fastvlm serve`: an OpenAI-compatible server, and a page to try it on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastvlm.cli.loading import DecodingRuntime, ModelOption, UsageError, usage
from fastvlm.cli.terminal import PlainConsole, print_aside
from fastvlm.functional.cores import usable_cores
from fastvlm.functional.errors import InputError
from fastvlm.serving.settings import ServerSettings

EXAMPLE_NAME = "fastvlm-example"
"""The example model's name in the API."""


def serve(
    *,
    model: ModelOption = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The draft's directory.",
            show_default="the example model's own, for it; else none",
        ),
    ] = None,
    settings: ServerSettings,
    max_slots: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Requests decoded together.")
    ] = 16,
    max_cache_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            min=1,
            max=2**63 - 1,
            help="The most memory for keys and values of what is decoded; other requests wait.",
            show_default="half of what the device has left",
        ),
    ] = None,
    prefix_bytes: Annotated[
        int,
        typer.Option(
            metavar="BYTES",
            min=0,
            max=2**63 - 1,
            help="The most memory for images and beginnings of earlier prompts; 0 keeps nothing.",
        ),
    ] = 256 * 2**20,
    runtime: DecodingRuntime,
) -> None:
    """Serve a model with OpenAI's API, and a page to try it on.

    Chat completions with images, streamed or whole, at /v1/chat/completions; metrics for
    Prometheus at /metrics. Any client of OpenAI's API works with it.
    """
    try:
        from fastvlm.serving.app import Server
        from fastvlm.serving.limits import is_loopback, read_keys
        from fastvlm.serving.process import Process
        from fastvlm.serving.remote_images import allowed_hosts
        from fastvlm.serving.request_log import write_log
    except ImportError as error:
        raise InputError(
            f"{error.name} is missing; install fastvlm with what serving needs:"
            " pip install 'fastvlm[serve]'."
        ) from error
    if not is_loopback(settings.host) and not read_keys(settings.api_key_file):
        raise UsageError(
            "A server that other machines reach needs an API key: give --api-key-file, or set"
            " FASTVLM_API_KEY."
        )
    with usage():
        allowed_hosts(settings.image_hosts)
    from fastvlm.example import example

    name = settings.served_name or (EXAMPLE_NAME if model is None else Path(model).name)
    if model is None:
        model, draft = str(example().MODEL), draft or example().DRAFT
    write_log(as_json=settings.log_json, quiet=runtime.quiet)
    if runtime.threads is None:
        # A core is left to the event loop and to the prompts that are prepared meanwhile: threads
        # that share one wait for each other.
        runtime = replace(runtime, threads=max(usable_cores() - 1, 1))

    def load() -> Server:
        vlm = runtime.load(
            model,
            draft,
            max_slots=max_slots,
            max_cache_bytes=max_cache_bytes,
            prefix_bytes=prefix_bytes,
        )
        return Server(vlm, name, settings)

    def tell(address: str) -> None:
        seconds = time.monotonic() - started
        PlainConsole().print(
            f"{name} is served at {address} (Ctrl-C ends it); loaded in {seconds:.1f} s."
        )

    started = time.monotonic()
    process = Process(load, settings, tell)
    if not runtime.quiet:
        print_aside(f"Loading {name} ...")
    process.serve_until_stopped()
