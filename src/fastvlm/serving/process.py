"""The process of a server: the address that it listens on, and the signals that end it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from fastvlm.functional.errors import InputError, first_line
from fastvlm.serving.app import Server, application
from fastvlm.serving.lifecycle import Lifecycle
from fastvlm.serving.settings import ServerSettings

SIGNAL_EXIT_CODE_BASE = 128
"""Exit code of a signal, whose number is added."""


def listening(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on the addresses of a host.

    Raises:
        InputError: There is no such host, or its port is taken or not allowed.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            if sockets and not port:
                # Each would have another port.
                break
            sockets.append(socket.create_server(address[:2], family=family))
    except (OSError, UnicodeError) as error:
        for one in sockets:
            one.close()
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(
            f"Can't listen on {host}, port {port}: {reason or first_line(error)}."
        ) from error
    return sockets


def check_tls(settings: ServerSettings) -> None:
    """Refuse a certificate that can't be used.

    Raises:
        InputError: It, or its key, is missing or broken, or one is of another.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return
    if settings.tls_cert is None or settings.tls_key is None:
        raise InputError("HTTPS needs both a certificate and its key: --tls-cert and --tls-key.")
    try:
        # A key that needs a password is refused: nobody is there to type one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert, settings.tls_key, password=lambda: b""
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and key:"
            f" {first_line(error)}."
        ) from error


class Process(uvicorn.Server):
    """Serves a model until a signal ends it.

    The first SIGTERM or Ctrl-C lets replies come to their end, see `Lifecycle.stop`; the second
    ends the process at once.

    Args:
        load: Loads the model.
        settings: How the server runs.
        on_ready: Called with the server's address once it answers.
    """

    def __init__(
        self, load: Callable[[], Server], settings: ServerSettings, on_ready: Callable[[str], None]
    ) -> None:
        check_tls(settings)
        self.error: BaseException | None = None
        self.exit_code: int | None = None
        """The code to end at once with; None for an ordinary end."""
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.life = Lifecycle(
            load, settings, on_ready=lambda: on_ready(self.address), on_failure=self._fail
        )
        self.settings = settings
        options: dict[str, Any] = {}
        if settings.tls_cert is not None:
            options = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
        super().__init__(
            uvicorn.Config(
                application(self.life, settings),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                # Whoever hasn't been sent the last event by then reads no more.
                timeout_graceful_shutdown=1,
                **options,
            )
        )
        self._sockets = listening(settings.host, settings.port)

    @property
    def address(self) -> str:
        """Where the server is reached."""
        host = self.settings.host
        host = f"[{host}]" if ":" in host else host
        scheme = "http" if self.settings.tls_cert is None else "https"
        return f"{scheme}://{host}:{self.settings.port or self._port}/"

    def serve_until_stopped(self) -> None:
        """Serve until a signal has ended it.

        Raises:
            FastVlmError: The model can't be loaded.
        """
        self._port = self._sockets[0].getsockname()[1]
        self.run(self._sockets)
        if self.error is not None:
            raise self.error
        if self.exit_code is not None:
            # Threads that load or compute can't be interrupted.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answer a signal: the first one politely."""
        del frame
        if self.life.server is None or self._loop is None:
            self.exit_code = 0 if sig == signal.SIGTERM else SIGNAL_EXIT_CODE_BASE + sig
            self.should_exit = self.force_exit = True
        elif self.life.stopping:
            self.exit_code = SIGNAL_EXIT_CODE_BASE + sig
            self.should_exit = self.force_exit = True
        else:
            self.life.stopping = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self.life.stop())
        self._draining.add_done_callback(lambda _: setattr(self, "should_exit", True))

    def _fail(self, error: BaseException) -> None:
        self.error, self.should_exit = error, True
