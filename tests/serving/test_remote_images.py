"""Images from other hosts: which hosts, at which addresses, how much and how long."""

from __future__ import annotations

import base64
import io
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from fastvlm.functional.errors import InputError
from fastvlm.serving.errors import ApiError
from fastvlm.serving.images import ImageOpener
from fastvlm.serving.remote_images import RemoteImages, allowed_hosts, is_public
from fastvlm.serving.settings import ServerSettings
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm
from tests.serving.serving import served

HOST = "images.example"
PUBLIC = "93.184.216.34"


def png(seed: int = 2) -> bytes:
    content = io.BytesIO()
    render(sample(seed), 128).save(content, "PNG")
    return content.getvalue()


class Host(BaseHTTPRequestHandler):
    """Answers as a host of images, by path."""

    def do_GET(self) -> None:
        seen: Any = self.server
        seen.asked.append((self.path, self.headers.get("Host")))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{seen.server_port}/a.png")
            self.end_headers()
            return
        if self.path == "/slow-head":
            time.sleep(2)
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 65536)
            elif self.path == "/slow":
                for _ in range(40):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            else:
                self.wfile.write(png())
        except OSError:
            seen.cut.set()

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture
def host() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked, server.cut = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Names:
    """A resolver whose answers are given, one after the other."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def __call__(self, *_: Any) -> list[str]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


def fetcher(port: int, resolver: Any = None, **options: Any) -> RemoteImages:
    """Return what fetches from the fake host, which is let pass for a public one."""
    usual = {"max_bytes": 10**6, "seconds": 5.0, "is_allowed": lambda _: True}
    hosts = frozenset({(HOST, port)})
    return RemoteImages(hosts, resolver=resolver or Names(["127.0.0.1"]), **{**usual, **options})


def test_an_image_is_fetched_from_the_address_in_the_name_of_the_host(host: Any) -> None:
    port = host.server_port
    found = fetcher(port).fetch(f"http://{HOST}:{port}/a%20b.png?size=1&x=é y", "p")
    assert found == png()
    assert host.asked == [("/a%20b.png?size=1&x=%C3%A9%20y", f"{HOST}:{port}")]


def test_the_address_that_was_checked_is_the_one_connected_to(host: Any) -> None:
    # The name leads elsewhere when it is asked for again, which it isn't.
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    checked: list[str] = []

    def allowed(address: str) -> bool:
        checked.append(address)
        return address == "127.0.0.1"

    port = host.server_port
    assert fetcher(port, names, is_allowed=allowed).fetch(f"http://{HOST}:{port}/", "p") == png()
    assert (names.asked, checked) == (1, ["127.0.0.1"])


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], [PUBLIC, "::1"], []])
def test_a_host_with_any_address_that_is_not_public_is_refused(
    host: Any, addresses: list[str]
) -> None:
    port = host.server_port
    with pytest.raises(ApiError) as caught:
        fetcher(port, Names(addresses), is_allowed=is_public).fetch(f"http://{HOST}:{port}/", "p")
    assert (caught.value.status, caught.value.code) == (400, "invalid_image_url")
    assert not host.asked


def test_an_address_that_cannot_be_reached_is_passed_over(host: Any) -> None:
    port = host.server_port
    names = Names(["127.0.0.9", "127.0.0.1"])
    assert fetcher(port, names).fetch(f"http://{HOST}:{port}/", "p") == png()


@pytest.mark.parametrize("path", ["redirect", "none", "endless", "slow", "slow-head"])
def test_what_a_host_may_not_send(host: Any, path: str) -> None:
    port = host.server_port
    started = time.monotonic()
    with pytest.raises(ApiError) as caught:
        fetcher(port, seconds=0.4).fetch(f"http://{HOST}:{port}/{path}", "p")
    assert time.monotonic() - started < 1.5
    assert caught.value.code == "invalid_image_url"
    # A redirect isn't followed, and an endless body isn't read to its end.
    assert len(host.asked) == 1
    assert path != "endless" or host.cut.wait(5)


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png", "http://images.example.evil.example/", "http://127.0.0.1/",
        "http://images.example:81/", "https://images.example:80/", "ftp://images.example/",
        "http://user@images.example/", "http://images.example@evil.example/", "http://[::1/",
        "http://evil.example\\@images.example/", "http://images.example:99999/", "http:///a",
        "http:",
        "http://images.example:x/", "https://listed.example/", "http://IMAGES\uff0eexample/",
    ],
)  # fmt: skip
def test_only_listed_hosts_and_ports_are_asked(url: str) -> None:
    names = Names([PUBLIC])
    hosts = allowed_hosts(f"{HOST}, listed.example:8443")
    remote = RemoteImages(hosts, 10**6, 0.1, resolver=names, is_allowed=lambda _: False)
    with pytest.raises(ApiError):
        remote.fetch(url, "p")
    assert not names.asked


@pytest.mark.parametrize(
    "url",
    ["http://images.example/", "https://IMAGES.example/", "https://images.example.:443/",
     "http://listed.example:8443/", "https://listed.example:8443/"],
)  # fmt: skip
def test_listed_hosts_are_asked(url: str) -> None:
    names = Names([PUBLIC])
    hosts = allowed_hosts(f"{HOST}, listed.example:8443")
    remote = RemoteImages(hosts, 10**6, 0.1, resolver=names, is_allowed=lambda _: False)
    with pytest.raises(ApiError, match="not public"):
        remote.fetch(url, "p")
    assert names.asked == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "198.18.0.1", "192.0.2.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "2001:0:7f00:1::", "::7f00:1",
        "2001:db8::1", "nonsense", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("value", ["http://a.example", "a/b", "u@a", "a:b", "a:99999", "é.example"])
def test_lists_of_hosts_that_are_none(value: str) -> None:
    with pytest.raises(InputError):
        allowed_hosts(value)


def test_https_is_checked_in_the_name_of_the_host(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, HOST)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked, server.names = [], []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    context.sni_callback = lambda _, name, __: server.names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        port = server.server_port
        trusting = ssl.create_default_context(cafile=str(cert))
        assert fetcher(port, tls=trusting).fetch(f"https://{HOST}:{port}/", "p") == png()
        assert server.names == [HOST]
        # Nobody vouches for it, or it is another's.
        with pytest.raises(ApiError):
            fetcher(port).fetch(f"https://{HOST}:{port}/", "p")
        other = RemoteImages(
            frozenset({("other.example", port)}), 10**6, 5, Names(["127.0.0.1"]), bool, trusting
        )
        with pytest.raises(ApiError):
            other.fetch(f"https://other.example:{port}/", "p")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """Return a certificate of a name and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_a_reply_about_a_fetched_image_is_that_about_the_image_itself(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, own = host.server_port, ImageOpener
    monkeypatch.setattr("fastvlm.serving.chat.ImageOpener", lambda s: own(s, fetcher(port)))
    data = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    with served(small_vlm(torch.float32)) as address:
        replies = []
        for url in (data, f"http://{HOST}:{port}/a.png"):
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Describe the scene."},
            ]
            body = {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 8,
                "temperature": 0,
            }
            found = httpx.post(f"{address}/v1/chat/completions", json=body)
            assert found.status_code == 200, found.text
            replies.append(found.json()["choices"][0]["message"]["content"])
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "http://[::ffff:127.0.0.1]/", "http://[", "//[", ":", ""]
)
def test_no_host_is_listed_by_default(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        ImageOpener(ServerSettings()).open(url, "p")
    assert caught.value.code == "invalid_image_url"
