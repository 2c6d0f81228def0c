"""The page in a browser, with the example model behind it in a process of its own."""

from __future__ import annotations

import io
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from fastvlm_example.scenes import render, sample
from tests.serving.browsing import PATIENCE, browsing, dropped, upload
from tests.serving.process import serve_process

sync_api = pytest.importorskip("playwright.sync_api", reason="The page is tested with playwright.")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    with serve_process() as found:
        yield found


@pytest.fixture
def page(browser: Any, server: tuple[str, subprocess.Popen[Any]]) -> Iterator[Any]:
    """The page, whose errors and breaches of its policy fail the test."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(6 * PATIENCE)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(server[0])
    sync_api.expect(page.locator("#model")).to_have_value("fastvlm-example", timeout=PATIENCE)
    yield page
    context.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def scene(seed: int) -> bytes:
    content = io.BytesIO()
    render(sample(seed), 256).save(content, "PNG")
    return content.getvalue()


def ask(page: Any, question: str) -> list[str]:
    """Ask, and return both replies once they are whole."""
    page.fill("#question", question)
    page.click("#ask")
    page.wait_for_selector(".turn:last-child .outcome > *")
    return page.locator(".turn:last-child .reply").all_text_contents()


def identical(page: Any, replies: list[str]) -> None:
    assert page.locator(".turn:last-child .verdict.same").count() == 1
    assert len(replies) == 2
    assert replies[0] == replies[1] != ""


def test_a_dropped_image_is_described_twice_the_same(page: Any) -> None:
    transfer = dropped(page, scene(1), "scene.png", "image/png")
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#attachments img[alt='scene.png']")
    page.fill("#question", "Describe the picture.")
    page.click("#ask")
    # It streams: some of the reply is there before its end.
    page.wait_for_function(
        """() => document.querySelector(".panel[data-phase=running] .reply")?.textContent"""
    )
    page.wait_for_selector(".turn:last-child .outcome > *")
    identical(page, page.locator(".turn:last-child .reply").all_text_contents())
    assert page.locator(".panel[data-kind=speculative] .reply .drafted").count()
    assert page.locator(".panel[data-kind=ordinary] .reply .drafted").count() == 0
    figures = page.locator(".figures dd").all_text_contents()
    assert figures
    assert all(re.fullmatch(r"[\d.]+( s)?", figure) for figure in figures)


def test_a_pasted_image_and_a_second_question(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.focus("#question")
    page.evaluate(
        """async (bytes) => {
          const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(scene(2)),
    )
    page.keyboard.press("Control+V")
    page.wait_for_selector("#attachments img")
    identical(page, ask(page, "Describe the picture."))
    identical(page, ask(page, "And what else is there?"))


def test_a_photo_of_the_camera(page: Any) -> None:
    page.context.grant_permissions(["camera"])
    page.click("#take")
    page.click("#camera-shoot:enabled")
    page.wait_for_selector("#attachments img[alt=photo]")
    identical(page, ask(page, "Describe the picture."))


def test_sampled_replies_are_identical_too(page: Any) -> None:
    page.fill("#temperature", "1")
    page.set_input_files("#files", [upload("scene.png", scene(3)), upload("other.png", scene(4))])
    page.locator("#attachments img").nth(1).wait_for()
    identical(page, ask(page, "Describe the pictures."))


def test_a_broken_image_is_told(page: Any) -> None:
    page.set_input_files("#files", [upload("broken.png", b"no image")])
    page.wait_for_selector("#composer-alert:not([hidden])")
    assert page.locator("#attachments img").count() == 0


def test_a_server_that_is_lost_amid_a_reply(browser: Any) -> None:
    with serve_process() as (address, process):
        page = browser.new_context().new_page()
        page.set_default_timeout(6 * PATIENCE)
        page.goto(address)
        sync_api.expect(page.locator("#model")).to_have_value("fastvlm-example", timeout=PATIENCE)
        page.set_input_files("#files", [upload("scene.png", scene(5))])
        page.wait_for_selector("#attachments img")
        page.fill("#question", "Describe the picture.")
        page.click("#ask")
        page.wait_for_function("""() => document.querySelector(".reply")?.textContent""")
        process.send_signal(signal.SIGKILL)
        page.wait_for_selector(".failure")
        assert page.locator(".reply").first.text_content() != ""
        page.context.close()
