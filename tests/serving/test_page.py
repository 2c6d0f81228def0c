"""The page in a browser, with a server that answers by the contract."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.browsing import PATIENCE, PHONE, browsing, dropped, picture, upload
from tests.serving.fake_server import REPLY, FakeServer, serving
from tests.serving.npm import npm_package

sync_api = pytest.importorskip("playwright.sync_api", reason="The page is tested with playwright.")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(pass_seconds=0.004) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: FakeServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, whose errors and breaches of its policy fail the test."""
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(server.url)
    connected(page)
    yield page
    context.close()
    # A browser reports what a test has fail on purpose.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def connected(page: Any) -> None:
    sync_api.expect(page.locator("#model")).to_have_value("fastvlm/example", timeout=PATIENCE)


def ask(page: Any, question: str, *, image: bool = True, wait: bool = True) -> None:
    if image:
        page.set_input_files("#files", [upload()])
        page.wait_for_selector("#attachments img")
    page.fill("#question", question)
    page.click("#ask")
    if wait:
        page.wait_for_selector(".turn:last-child .outcome > *")


def replies(page: Any) -> list[str]:
    return page.locator(".turn:last-child .reply").all_text_contents()


def images_of(body: dict[str, Any]) -> list[list[str]]:
    """The URLs of the images of each message of a user."""
    return [
        [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        for message in body["messages"]
        if message["role"] == "user"
    ]


def test_both_replies_stream_side_by_side_and_are_identical(page: Any, server: FakeServer) -> None:
    server.goes_on.clear()
    ask(page, "What is this?", wait=False)
    sync_api.expect(page.locator(".reply").first).to_have_text("A person on skis stand")
    assert page.locator(".panel").first.get_attribute("data-phase") == "running"
    assert page.locator(".state").last.text_content() == "Waits for the other to finish."
    assert len(server.requests) == 1
    server.goes_on.set()
    page.wait_for_selector(".verdict.same")
    assert replies(page) == [REPLY, REPLY]
    assert [body["strategy"] for body in server.requests] == ["autoregressive", "imitation"]
    # Both compute all of it.
    assert [body["cache"] for body in server.requests] == [False, False]
    drafted = page.locator(".panel[data-kind=speculative] .reply .drafted").all_text_contents()
    assert drafted[:2] == ["person", "on"]
    assert page.locator(".panel[data-kind=ordinary] .reply .drafted").count() == 0
    for figure in page.locator(".figures dd").all_text_contents():
        assert re.fullmatch(r"[\d.]+( s)?", figure)
    assert "89%" in page.locator(".chart svg").get_attribute("aria-label")
    assert "identical" in page.locator("#announcer").text_content()


def test_replies_that_differ_are_told_apart(page: Any) -> None:
    ask(page, "Do they differ?")
    assert page.locator(".verdict").text_content() == (
        f"The replies differ from character {REPLY.index('red') + 1}."
    )


def test_one_reply_alone(page: Any, server: FakeServer) -> None:
    page.uncheck("#compare")
    ask(page, "What is this?")
    assert replies(page) == [REPLY]
    assert len(server.requests) == 1
    assert "cache" not in server.requests[0]
    assert page.locator(".verdict").count() == 0


def test_both_at_once(page: Any, server: FakeServer) -> None:
    page.check("#together")
    ask(page, "What is this?")
    assert replies(page) == [REPLY, REPLY]
    assert {body["strategy"] for body in server.requests} == {"autoregressive", "imitation"}


def test_an_image_is_dropped(page: Any, server: FakeServer) -> None:
    transfer = dropped(page, picture(form="JPEG"), "photo.jpg", "image/jpeg")
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    assert page.locator("#drop-overlay").is_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#attachments img[alt='photo.jpg']")
    assert not page.locator("#drop-overlay").is_visible()
    ask(page, "What is this?", image=False)
    ((url,),) = images_of(server.requests[0])
    assert url.startswith("data:image/jpeg;base64,")


def test_an_image_is_pasted(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.focus("#question")
    page.evaluate(
        """async () => {
          const canvas = new OffscreenCanvas(8, 8);
          canvas.getContext("2d").fillRect(0, 0, 8, 8);
          const blob = await canvas.convertToBlob({ type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    page.keyboard.press("Control+V")
    page.wait_for_selector("#attachments img")


def test_a_photo_is_taken(page: Any, server: FakeServer) -> None:
    page.context.grant_permissions(["camera"])
    page.click("#take")
    page.click("#camera-shoot:enabled")
    page.wait_for_selector("#attachments img[alt=photo]")
    assert not page.locator("#camera").is_visible()
    assert page.evaluate("document.getElementById('camera-video').srcObject") is None
    ask(page, "What is this?", image=False)
    ((url,),) = images_of(server.requests[0])
    assert url.startswith("data:image/jpeg;base64,")


def test_a_large_image_is_scaled_down(page: Any) -> None:
    page.set_input_files("#files", [upload(data=picture(size=(5000, 100)))])
    page.wait_for_selector("#attachments img")
    assert page.locator("#attachments img").evaluate("image => image.naturalWidth") == 2048
    assert "scaled down" in page.locator("#composer-alert").text_content()


def test_a_broken_image_is_named_and_the_others_are_kept(page: Any) -> None:
    page.fill("#question", "What is this?")
    page.set_input_files("#files", [upload("broken.png", b"no image"), upload("whole.png")])
    page.wait_for_selector("#attachments img[alt='whole.png']")
    assert page.locator("#attachments img").count() == 1
    assert "broken.png" in page.inner_text("#composer-alert")
    assert page.input_value("#question") == "What is this?"


def test_more_images_than_the_model_takes(page: Any) -> None:
    page.set_input_files("#files", [upload(f"{index}.png") for index in range(5)])
    page.wait_for_selector("#composer-alert:not([hidden])")
    assert page.locator("#attachments img").count() == 4


def test_a_conversation_has_its_turns_and_images(page: Any, server: FakeServer) -> None:
    page.uncheck("#compare")
    ask(page, "What is this?")
    ask(page, "And this?")
    ask(page, "Which is nicer?", image=False)
    body = server.requests[-1]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert [len(urls) for urls in images_of(body)] == [1, 1, 0]
    assert body["messages"][1]["content"] == REPLY
    page.click("#new")
    assert page.locator("#welcome").is_visible()
    ask(page, "And now?", image=False)
    assert len(server.requests[-1]["messages"]) == 1


def test_settings_reach_the_server(page: Any, server: FakeServer) -> None:
    for name, value in {
        "draft-length": "6",
        "max-tokens": "48",
        "temperature": "0.7",
        "image-size": "2",
    }.items():
        page.fill(f"#{name}", value)
    page.fill("#seed", "5")
    page.fill("#stop-strings", "END\n\\n\\n")
    page.select_option("#strategy", "prompt-lookup")
    ask(page, "What is this?")
    ordinary, speculative = server.requests
    for body in (ordinary, speculative):
        assert {name: body[name] for name in ("max_tokens", "temperature", "image_size")} == {
            "max_tokens": 48,
            "temperature": 0.7,
            "image_size": 512,
        }
        assert body["seed"] == 5
        assert body["stop"] == ["END", "\n\n"]
    assert speculative["strategy"] == "prompt-lookup"
    assert speculative["num_speculative_tokens"] == 6
    assert "num_speculative_tokens" not in ordinary
    assert "48 tokens, the maximum" in page.locator(".state").first.text_content()


def test_sampled_replies_share_a_new_seed(page: Any, server: FakeServer) -> None:
    page.fill("#temperature", "1")
    ask(page, "What is this?")
    seeds = {body["seed"] for body in server.requests}
    assert len(seeds) == 1


def test_stop_ends_the_stream(page: Any, server: FakeServer) -> None:
    server.goes_on.clear()
    page.uncheck("#compare")
    ask(page, "A long one", wait=False)
    page.wait_for_selector(".reply .drafted")
    page.click("#stop")
    page.wait_for_selector(".state:has-text('then stopped')")
    server.goes_on.set()
    assert page.locator("#ask").is_visible()
    for _ in range(50):
        if server.hung_up:
            break
        page.wait_for_timeout(50)
    assert server.hung_up == 1
    kept = replies(page)[0]
    ask(page, "Go on", image=False)
    assert server.requests[-1]["messages"][1]["content"] == kept


def test_a_lost_server_loses_nothing_that_was_typed(browser: Any) -> None:
    with serving(pass_seconds=0.004) as server:
        port = server.server_address[1]
        page = browser.new_context().new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        connected(page)
    ask(page, "What is this?")
    assert "be reached" in page.inner_text(".failure")
    page.click("button:text('Edit question')")
    assert page.input_value("#question") == "What is this?"
    assert page.locator("#attachments img").count() == 1
    page.press("#question", "Enter")
    page.wait_for_selector(".failure")
    with serving(port=port, pass_seconds=0.004) as server:
        page.click("button:text('Try again')")
        page.wait_for_selector(".verdict.same")
        assert [len(urls) for urls in images_of(server.requests[0])] == [1]
    page.context.close()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Are you busy?", "The server is busy, and asks to wait 3 seconds."),
        ("Are you lost?", "The connection to the server was lost."),
        ("Is it refused?", "The image cannot be read."),
    ],
)
def test_errors_are_told_and_can_be_tried_again(
    page: Any, server: FakeServer, question: str, message: str
) -> None:
    ask(page, question)
    assert message in page.inner_text(".failure")
    assert len(server.requests) == 1
    server.recovered = True
    page.click("button:text('Try again')")
    page.wait_for_selector(".verdict.same")
    assert page.locator(".turn").count() == 1


def test_a_key_is_asked_for_once(browser: Any) -> None:
    with serving(pass_seconds=0.004, key="secret") as server:
        page = browser.new_context().new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        page.fill("#key-input", "wrong")
        page.press("#key-input", "Enter")
        page.wait_for_selector("#key-wrong:not([hidden])")
        page.fill("#key-input", "secret")
        page.press("#key-input", "Enter")
        ask(page, "What is this?")
        assert replies(page) == [REPLY, REPLY]
        page.reload()
        connected(page)
        assert not page.locator("#key").is_visible()
        assert page.evaluate("Object.values(localStorage).join()") == ""
        page.context.close()


def test_the_keyboard_alone(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("this?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".verdict.same")
    assert page.inner_text(".question") == "What is\nthis?"
    assert page.evaluate("document.activeElement.id") == "question"


@pytest.mark.parametrize("page", [{"viewport": PHONE, "has_touch": True}], indirect=True)
def test_a_phone_scrolls_down_only(page: Any) -> None:
    def overflow() -> int:
        return page.evaluate("document.documentElement.scrollWidth - innerWidth")

    assert overflow() <= 0
    page.set_input_files("#files", [upload(f"{index}.png") for index in range(4)])
    page.locator("#attachments img").nth(3).wait_for()
    assert overflow() <= 0
    page.fill("#question", "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3)
    page.click("#ask")
    page.wait_for_selector(".verdict.same")
    assert overflow() <= 0
    page.click("#settings-toggle")
    assert page.locator("#settings").is_visible()
    assert overflow() <= 0
    page.keyboard.press("Escape")
    assert not page.locator("#settings").is_visible()


@pytest.fixture(scope="module")
def axe() -> str:
    return (npm_package("axe-core", "4") / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"color_scheme": "light", "viewport": PHONE, "has_touch": True},
    ],
    indirect=True,
    ids=["light", "dark", "phone"],
)
def test_axe_finds_nothing_serious(page: Any, axe: str) -> None:
    page.evaluate(axe)

    def findings() -> list[str]:
        found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        return [
            f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}"
            for one in found
            if one["impact"] in ("moderate", "serious", "critical")
        ]

    assert findings() == []
    ask(page, "What is this?")
    page.set_input_files("#files", [upload(), upload("broken.png", b"no image")])
    page.wait_for_selector("#composer-alert:not([hidden])")
    assert findings() == []
    ask(page, "Are you busy?", image=False)
    if not page.locator("#settings").is_visible():
        page.click("#settings-toggle")
    assert findings() == []
