"""Images from hosts that the operator lists, fetched from addresses that are checked first."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import httpcore

from fastvlm.functional.errors import InputError
from fastvlm.serving.errors import ApiError
from fastvlm.serving.settings import listed

DEFAULT_PORTS = {"http": 80, "https": 443}
"""Schemes that images are fetched by, with the port of a host that is listed without one."""
TRANSLATED_IPV4 = IPv6Network("64:ff9b::/96")
"""IPv6 addresses that a gateway (NAT64) makes IPv4 addresses of: the last 32 bits."""
URL_CHARACTERS = "/?%:@!$&'()*+,;=~"
"""What is left as it is in a path and a query; anything else is escaped."""
OK = 200

_resolving = ThreadPoolExecutor(4, "fastvlm-resolve")
"""Looking up a name can't be interrupted: a slow one must not hold up who waits no longer."""

Resolver = Callable[[str, int], Awaitable[list[str]]]
AddressPolicy = Callable[[str], bool]


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host.

    Raises:
        OSError: It has none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(
        _resolving, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Return whether an address is one of the internet's own, and so is any IPv4 one inside it.

    Private, loopback, link-local (the metadata of cloud machines), multicast, unspecified and
    reserved addresses aren't.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.scope_id is not None:
        return False
    if isinstance(found, IPv6Address):
        return all(_is_global(one) for one in _with_embedded(found))
    return _is_global(found)


def _with_embedded(address: IPv6Address) -> Iterable[IPv4Address | IPv6Address]:
    """Yield an IPv6 address and the IPv4 addresses that packets to it may end at."""
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    yield from address.teredo or ()
    if address in TRANSLATED_IPV4:
        yield IPv4Address(int(address) & 0xFFFFFFFF)


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    # What `is_global` says of multicast and of reserved ranges differs between Python's releases.
    return address.is_global and not (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and address not in TRANSLATED_IPV4)
    )


def allowed_hosts(values: str | None) -> frozenset[tuple[str, int | None]]:
    """Return the hosts of a list, each with its port, or None for the default ports.

    Raises:
        InputError: One is no host.
    """
    found = set()
    for value in listed(values):
        try:
            parts = urlsplit(f"//{value}")
            host, port = parts.hostname, parts.port
            plain = parts.netloc == value and "@" not in value and value.isascii()
        except ValueError:
            host, port, plain = None, None, False
        if not host or not plain:
            raise InputError(
                f"Hosts of images are names such as example.com or example.com:8443; got {value!r}."
            )
        found.add((host.rstrip("."), port))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class RemoteImages:
    """Fetches images.

    A host's name is resolved once, all of its addresses are checked, and the connection goes to one
    of these: a name that resolves to another address a moment later changes nothing.

    Args:
        hosts: The hosts that are listed, each with a port, or None for the default ones.
        max_bytes: The largest image, in bytes.
        seconds: The longest that an image may take, in seconds.
        resolver: Returns the addresses of a host.
        is_allowed: Whether an address may be connected to.
        tls: Which certificates are trusted; None for the system's own.
    """

    hosts: frozenset[tuple[str, int | None]]
    max_bytes: int
    seconds: float
    resolver: Resolver = field(default=resolve)
    is_allowed: AddressPolicy = field(default=is_public)
    tls: ssl.SSLContext | None = None

    def fetch(self, url: str, param: str) -> bytes:
        """Return the bytes of an image, in a thread without an event loop.

        Args:
            url: Its `http://` or `https://` URL.
            param: The field of the request, for an error.

        Raises:
            ApiError: The host isn't listed, has an address that isn't public, or sends no image
                within the limits.
        """
        parts, host, port = self._checked(url, param)
        try:
            return asyncio.run(self._fetch(parts, host, port, param))
        except TimeoutError as error:
            raise refused("The image takes too long to fetch.", param) from error
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise refused("The image can't be fetched from its host.", param) from error

    def _checked(self, url: str, param: str) -> tuple[SplitResult, str, int]:
        """Return the parts of a URL, its host and its port.

        Raises:
            ApiError: It isn't a URL of a listed host.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise refused("The image's URL is malformed.", param) from error
        usual = DEFAULT_PORTS.get(parts.scheme)
        port = usual if port is None else port
        known = (host, port) in self.hosts or (port == usual and (host, None) in self.hosts)
        if usual is None or port is None or "@" in parts.netloc or not known:
            raise refused(
                "This server fetches no images from there; send a data URL instead.", param
            )
        return parts, host, port

    async def _fetch(self, parts: SplitResult, host: str, port: int, param: str) -> bytes:
        async with asyncio.timeout(self.seconds):
            addresses = await self.resolver(host, port)
            if not addresses or not all(map(self.is_allowed, addresses)):
                raise refused("The image's host has an address that is not public.", param)
            target = quote(parts.path or "/", URL_CHARACTERS)
            if parts.query:
                target += "?" + quote(parts.query, URL_CHARACTERS)
            url = httpcore.URL(scheme=parts.scheme, host=host, port=port, target=target)
            named = host if port == DEFAULT_PORTS[parts.scheme] else f"{host}:{port}"
            headers = {
                "Host": named,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "fastvlm",
            }
            async with (
                httpcore.AsyncConnectionPool(
                    ssl_context=self.tls or ssl.create_default_context(),
                    network_backend=_ToAddresses(addresses),
                ) as pool,
                pool.stream("GET", url, headers=list(headers.items())) as response,
            ):
                return await self._body(response, param)

    async def _body(self, response: httpcore.Response, param: str) -> bytes:
        if response.status != OK:
            # A redirect is not followed: it could lead anywhere.
            raise refused(f"The image's host answers with {response.status}.", param)
        content = bytearray()
        async for part in response.aiter_stream():
            content += part
            if len(content) > self.max_bytes:
                raise refused(f"The image is larger than {self.max_bytes:,} bytes.", param)
        return bytes(content)


class _ToAddresses(httpcore.AsyncNetworkBackend):
    """Connects to addresses that are known already; what the host is called plays no part.

    Args:
        addresses: The addresses; the next is tried where one can't be reached.
    """

    def __init__(self, addresses: list[str]) -> None:
        self.addresses, self.inner = addresses, httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, *rest: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """Return a connection; `httpcore` starts TLS on it in the name of the host."""
        del host
        *others, last = self.addresses
        for address in others:
            try:
                return await self.inner.connect_tcp(address, port, *rest, **options)
            except httpcore.ConnectError:
                continue
        return await self.inner.connect_tcp(last, port, *rest, **options)

    async def sleep(self, seconds: float) -> None:
        """Wait, between two attempts of `httpcore`."""
        await self.inner.sleep(seconds)


def refused(message: str, param: str) -> ApiError:
    """Return the error of an image that isn't fetched."""
    return ApiError(message, param=param, code="invalid_image_url")
