"""A server of several replicas on Ray Serve."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvlm.cluster.connection import connected, is_local, needed_ray
from fastvlm.functional.errors import FastVlmError, first_line
from fastvlm.serving.app import Server
from fastvlm.serving.settings import ServerSettings

APPLICATION = "fastvlm"
"""The application's name on Ray Serve, and the deployments' first word."""
REPLICAS_OF_GATEWAY = 8
"""Replicas for each process that reads requests and streams replies."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many replicas there are, and what each takes.

    Args:
        replicas: Their number; the least, where it follows the load.
        max_replicas: The most; None for a fixed number.
        max_slots: Requests that each decodes together.
        cpus: Cores of each.
        gpus: GPUs of each.
    """

    replicas: int
    max_replicas: int | None = None
    max_slots: int = 16
    cpus: float = 1
    gpus: float = 0

    def deployed(self) -> dict[str, Any]:
        """Return what Ray Serve is told of it."""
        most = self.max_replicas
        number: dict[str, Any] = {"num_replicas": self.replicas}
        if most is not None:
            number = {
                "autoscaling_config": {
                    "min_replicas": self.replicas,
                    "max_replicas": most,
                    "target_ongoing_requests": self.max_slots,
                }
            }
        return {
            **number,
            # Beyond a second batch that waits, the next replica is better than the right one.
            "max_ongoing_requests": 2 * self.max_slots,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


def deploy(
    load: Callable[[], Server], settings: ServerSettings, fleet: Fleet, *, quiet: bool = False
) -> None:
    """Deploy the server on the Ray that is connected, or update it without losing a request.

    Replicas of before are replaced one after the other, each once its last reply has ended.

    Args:
        load: Loads the model of a replica; it is pickled.
        settings: How the server runs.
        fleet: How many replicas there are.
        quiet: Whether only warnings and errors are logged.

    Raises:
        FastVlmError: A replica can't be started.
    """
    serve = needed_ray("ray.serve")
    needed_ray("ray.serve.config")
    from fastvlm.cluster.gateway import Gateway
    from fastvlm.cluster.replica import Replica
    from fastvlm.cluster.routing import AffinityRouter

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    log = serve.schema.LoggingConfig(log_level="WARNING", enable_access_log=False)
    options: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.tls_cert is not None:
        options |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    serve.start(proxy_location="EveryNode", http_options=options, logging_config=log)

    @serve.ingress()  # type: ignore[untyped-decorator, unused-ignore]
    class Door:
        """The gateway as Ray Serve has it."""

        def __init__(self, replicas: Any) -> None:
            self.replicas = replicas

        def __serve_build_asgi_app__(self) -> Any:
            return Gateway(self.replicas, settings).app()

    replicas = serve.deployment(
        name="replica",
        max_queued_requests=settings.max_waiting or -1,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        request_router_config=serve.config.RequestRouterConfig(request_router_class=AffinityRouter),
        logging_config=log,
        **fleet.deployed(),
    )(Replica).bind(load, quiet)
    most = fleet.max_slots * (fleet.max_replicas or fleet.replicas) + settings.max_waiting
    gateways = serve.deployment(
        name="gateway",
        num_replicas=1 + (fleet.max_replicas or fleet.replicas) // REPLICAS_OF_GATEWAY,
        max_ongoing_requests=2 * most + 16,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=log,
    )(Door).bind(replicas)
    try:
        serve.run(gateways, name=APPLICATION, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        raise FastVlmError(f"The replicas can't be started: {first_line(error)}.") from error


@contextmanager
def fleet_on(
    load: Callable[[], Server],
    settings: ServerSettings,
    fleet: Fleet,
    address: str | None = None,
    *,
    quiet: bool = False,
) -> Iterator[None]:
    """Deploy the server; on this machine alone it ends with the context, on a cluster it stays.

    For the arguments and errors see `deploy` and `connected`.
    """
    cores = int((fleet.max_replicas or fleet.replicas) * fleet.cpus) + 1
    with connected(address, max(cores, os.cpu_count() or 1)):
        deploy(load, settings, fleet, quiet=quiet)
        try:
            yield
        finally:
            if is_local(address):
                needed_ray("ray.serve").shutdown()


def wait_for_signal() -> int:
    """Return the signal that ends this process, once it has come."""
    ended = threading.Event()
    came: list[int] = []

    def end(number: int, _: Any) -> None:
        came.append(number)
        ended.set()

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, end)
    ended.wait()
    return came[0]
