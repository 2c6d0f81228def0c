"""`fastvlm serve`: an OpenAI-compatible server, and a page to try it on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.loading import DecodingRuntime, ModelOption, UsageError, usage
from fastvlm.cli.terminal import PlainConsole, print_aside
from fastvlm.functional.cores import usable_cores
from fastvlm.functional.errors import InputError
from fastvlm.serving.settings import ServerSettings

if TYPE_CHECKING:
    from fastvlm.serving.app import Server

EXAMPLE_NAME = "fastvlm-example"
"""The example model's name in the API."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How many replicas there are, and where."""

    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=100_000,
            help="Processes with a model each, on Ray Serve (pip install 'fastvlm[ray]'); requests"
            " about the same image, and of the same conversation, go to the same one.",
            show_default="one, without Ray",
        ),
    ] = None
    max_replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=100_000,
            help="The most replicas: their number follows the requests that wait, from --replicas"
            " on.",
            show_default="as many as --replicas",
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Ray cluster to serve on, such as auto or HOST:6379. The server stays there when"
            " the command ends; called again, it updates the server without losing a request.",
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether there are to be replicas at all.

        Raises:
            UsageError: There are to be more than the most.
        """
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise UsageError(
                f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas or 1}."
            )
        return (self.replicas, self.max_replicas, self.address) != (None, None, None)


@dataclass(frozen=True, slots=True)
class ServerLoader:
    """Loads a model to serve; it can be pickled.

    Args:
        runtime: How to compute.
        model: The model.
        draft: The draft's directory.
        name: The model's name in the API.
        settings: How the server runs.
        memory: What the model is loaded with besides.
    """

    runtime: DecodingRuntime
    model: str
    draft: Path | None
    name: str
    settings: ServerSettings
    memory: Mapping[str, Any]

    def __call__(self) -> Server:
        """Return the server."""
        from fastvlm.serving.app import Server

        vlm = self.runtime.load(self.model, self.draft, **self.memory)
        return Server(vlm, self.name, self.settings, self.draft)


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
    fleet: FleetOptions,
    runtime: DecodingRuntime,
) -> None:
    """Serve a model with OpenAI's API, and a page to try it on.

    Chat completions with images, streamed or whole, at /v1/chat/completions; metrics for
    Prometheus at /metrics. Any client of OpenAI's API works with it.
    """
    try:
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
    if settings.draft_refresh and draft is None and model is not None:
        raise UsageError("--draft-refresh looks at a draft's directory: give --draft.")
    from fastvlm.example import example

    name = settings.served_name or (EXAMPLE_NAME if model is None else Path(model).name)
    if model is None:
        model, draft = str(example().MODEL), draft or example().DRAFT
    if runtime.threads is None:
        # A core is left to the event loop and to the prompts that are prepared meanwhile: threads
        # that share one wait for each other.
        spare = max(usable_cores() - 1, 1) // (fleet.replicas or 1)
        runtime = replace(runtime, threads=max(spare, 1))

    memory = {
        "max_slots": max_slots,
        "max_cache_bytes": max_cache_bytes,
        "prefix_bytes": prefix_bytes,
    }
    load = ServerLoader(runtime, model, draft, name, settings, memory)
    if fleet.wanted:
        serve_fleet(load, fleet)
        return
    write_log(as_json=settings.log_json, quiet=runtime.quiet)

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


def serve_fleet(load: ServerLoader, options: FleetOptions) -> None:
    """Serve with replicas: on this machine until a signal ends it, on a cluster for good.

    Args:
        load: Loads the model of a replica.
        options: How many replicas there are, and where.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or it would not know the keys.
        FastVlmError: A replica can't be started.
    """
    from fastvlm.cluster.connection import is_local, needed_ray
    from fastvlm.cluster.serving import Fleet, fleet_on, wait_for_signal
    from fastvlm.serving.limits import read_keys
    from fastvlm.serving.process import check_tls

    needed_ray("ray.serve")
    settings, runtime = load.settings, load.runtime
    check_tls(settings)
    local = is_local(options.address)
    if not local and settings.api_key_file is None and read_keys(None):
        raise InputError(
            "The machines of a cluster don't have this one's FASTVLM_API_KEY: give --api-key-file"
            " with a file that all of them find."
        )
    fleet = Fleet(
        options.replicas or 1,
        options.max_replicas,
        load.memory["max_slots"],
        cpus=runtime.threads or 1,
        gpus=0 if runtime.device == "cpu" else 1,
    )
    started = time.monotonic()
    if not runtime.quiet:
        print_aside(f"Loading {load.name} ...")
    with fleet_on(load, settings, fleet, options.address, quiet=runtime.quiet):
        scheme = "http" if settings.tls_cert is None else "https"
        ends = "Ctrl-C ends it" if local else "serve shutdown ends it"
        PlainConsole().print(
            f"{load.name} is served at {scheme}://{settings.host}:{settings.port}/ ({ends});"
            f" loaded in {time.monotonic() - started:.1f} s."
        )
        if local:
            wait_for_signal()
