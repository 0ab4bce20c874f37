"""The page in a real browser, on a real server with the embedded model.

Chromium is Debian's; playwright only drives it.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.serve import server
from latentdiff.images import encoded_image
from tests.launching import free_port

pytestmark = pytest.mark.slow
CHROMIUM = Path("/usr/bin/chromium")
SEED = "8888888888888888888"
MARKUP = '<img src=x onerror="window.ran = true">'
_PATIENCE = 60_000
"""Milliseconds, on a machine that does other things too."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, loras = free_port(), tmp_path_factory.mktemp("loras")
    (loras / "fur.safetensors").write_text("no LoRA")
    with server("--lora-dir", str(loras), port=port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever a test does there, it asks no other host and logs no error."""
    contexts, seen = list[Any](), list[str]()
    expected = set[str]()

    def open_page(address: str, errors: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        expected.update({errors} - {""})
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)

        def on_request(request: Any) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                seen.append(f"asked {request.url}")

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not any(
                e in message.text for e in expected
            ):
                seen.append(message.text)

        page.on("request", on_request)
        page.on("console", on_console)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("filechooser", lambda _: None)  # from now on, not while a key is already down
        page.goto(address)
        page.locator("[role=tab][aria-selected=true]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def field(page: Any, label: str) -> Any:
    return page.get_by_label(label, exact=True)


def result(page: Any, act: Callable[[], None]) -> tuple[dict[str, Any], Image.Image]:
    """What the page asked for when something was done, and the image that it then shows."""
    with page.expect_request("**/api/*") as request:
        act()
    page.locator("#progress").wait_for(state="hidden")
    assert page.locator(".problem, #problem").all_inner_texts() == [""]
    return request.value.post_data_json, shown(page)


def shown(page: Any) -> Image.Image:
    page.locator("#shown").wait_for()
    script = """async (url) => {
      const pixels = new Image();
      pixels.src = url;
      await pixels.decode();
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [pixels.naturalWidth, pixels.naturalHeight];
      canvas.getContext("2d").drawImage(pixels, 0, 0);
      return canvas.toDataURL("image/png");
    }"""
    return decoded(page.evaluate(script, page.locator("#shown-image").get_attribute("src")))


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def ask(address: str, task: str, **asked: Any) -> Image.Image:
    """The image that the API gives."""
    body = json.dumps(asked).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}api/{task}", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        *_, last = answer.read().splitlines()
    return decoded(json.loads(last)["images"][0]["image"])


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def drop(page: Any, file: bytes, name: str, where: str = "main") -> None:
    data = page.evaluate_handle(
        """([text, name]) => {
          const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], name, { type: "image/png" }));
          return data;
        }""",
        [base64.b64encode(file).decode(), name],
    )
    page.dispatch_event(where, "drop", {"dataTransfer": data})


def photo(size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded_image(Image.fromarray(pixels), ".png", {})


def test_a_prompt_gives_the_picture_that_the_api_gives(
    address: str, opened: Callable[..., Any]
) -> None:
    page = opened(address)
    field(page, "Prompt").fill(f"a red apple {MARKUP}")
    field(page, "Steps").fill("3")
    field(page, "Seed").fill(SEED)
    asked, made = result(page, lambda: page.locator("#make").click())
    assert asked["seed"] == SEED
    own = {"prompt": f"a red apple {MARKUP}", "num_inference_steps": 3, "seed": SEED}
    assert difference(made, ask(address, "text_to_image", **own)) <= 1
    assert SEED in page.locator("#metadata").inner_text()
    assert MARKUP in page.locator("#metadata").inner_text()
    # Every field again, from other ones and another tab.
    page.locator("#tab-colorize").click()
    field(page, "Prompt").fill("other")
    field(page, "Seed").fill("1")
    field(page, "Steps").fill("9")
    page.locator("#reuse").click()
    again, image = result(page, lambda: page.locator("#make").click())
    assert again == {**asked, "timestep_spacing": "trailing", "clip_skip": 0}
    assert difference(made, image) <= 1
    assert page.evaluate("window.ran") is None


def test_what_is_not_masked_stays_as_it_was_sent(address: str, opened: Callable[..., Any]) -> None:
    page = opened(address)
    page.locator("#tab-inpaint").click()
    drop(page, photo(), "photo.png", "#choose")
    box = page.locator("#mask").bounding_box()

    def stroke(*places: tuple[float, float]) -> None:
        for k, (x, y) in enumerate(places):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if not k:
                page.mouse.down()
        page.mouse.up()

    stroke((0.3, 0.5), (0.7, 0.5))
    stroke((0.1, 0.1), (0.9, 0.9))
    page.locator("#undo").click()
    page.locator("#erase").click()
    stroke((0.65, 0.45), (0.65, 0.55))
    field(page, "Prompt").fill("a red apple")
    field(page, "Steps").fill("3")
    page.locator("#more > summary").click()
    page.locator("[name=fill]").select_option("true")
    asked, made = result(page, lambda: page.locator("#make").click())
    assert asked["fill"] is True
    given, mask = (np.asarray(decoded(asked[name])) for name in ("image", "mask_image"))
    assert np.array_equal(given, np.asarray(Image.open(io.BytesIO(photo()))))
    masked = mask[..., 0]
    assert masked[32, 24] == 255  # under the first stroke
    assert masked[10, 10] == masked[55, 55] == 0  # the second was undone
    assert masked[32, 42] == 0  # erased
    kept = masked == 0
    assert np.array_equal(np.asarray(made)[kept], given[kept])
    assert (np.asarray(made)[~kept] != given[~kept]).any()
    # Turned round, and from a file.
    page.locator("#invert").click()
    asked, _ = result(page, lambda: page.locator("#make").click())
    assert np.array_equal(np.asarray(decoded(asked["mask_image"]))[..., 0], 255 - masked)
    file = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    file.paste((255, 255, 255, 255), (8, 8, 24, 24))
    page.locator("#mask-file").set_input_files(
        {"name": "m.png", "mimeType": "image/png", "buffer": encoded_image(file, ".png", {})}
    )
    page.locator("#announce").get_by_text("The mask is loaded").wait_for()
    asked, _ = result(page, lambda: page.locator("#make").click())
    expected = np.zeros((64, 64), np.uint8)
    expected[8:24, 8:24] = 255
    assert np.array_equal(np.asarray(decoded(asked["mask_image"]))[..., 0], expected)
    # Image and mask come back with the settings.
    page.locator("#clear").click()
    page.locator("#tab-text").click()
    page.locator("#reuse").click()
    page.locator("#announce").get_by_text("Its settings are in the form").wait_for()
    again, _ = result(page, lambda: page.locator("#make").click())
    assert {name: again[name] for name in asked if name != "seed"} == asked


def test_a_large_photo_is_sent_upright_at_the_size_chosen(
    address: str, opened: Callable[..., Any]
) -> None:
    """Near the model's by default; as the camera held it, whatever its file says."""
    red_above = Image.new("RGB", (200, 100), "blue")
    red_above.paste("red", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    red_above.save(file, "JPEG", exif=exif, quality=95)
    page = opened(address)
    page.locator("#tab-image").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#choose").click()
    chooser.value.set_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}
    )
    field(page, "Prompt").fill("a red apple")
    field(page, "Steps").fill("2")
    asked, made = result(page, lambda: page.locator("#make").click())
    sent = decoded(asked["image"])
    assert sent.size == made.size == (32, 64)
    top, bottom = (np.asarray(sent)[y, 16].astype(int) for y in (8, 56))
    assert top[0] > 200 > top[2] + 100 and bottom[2] > 200 > bottom[0] + 100
    page.locator("#working-size").select_option("100x200")
    asked, made = result(page, lambda: page.locator("#make").click())
    assert base64.b64decode(asked["image"].partition(",")[2]) == file.getvalue()
    assert made.size == (100, 200)


def test_cancelling_takes_the_work_off_the_server(address: str, opened: Callable[..., Any]) -> None:
    """What is being made, and what waits behind it."""
    first, second = opened(address), opened(address)
    for page in (first, second):
        field(page, "Steps").fill("150")
        page.locator("#make").click()
        page.locator("#progress").wait_for()
        if page is first:
            page.locator("#previews img").wait_for()
    second.get_by_text("In the queue, 1 before it").first.wait_for()
    assert waiting(address) == 1
    second.locator("#cancel").click()
    second.locator("#progress").wait_for(state="hidden")
    assert any(waiting(address) == 0 for _ in range(50))
    assert first.locator("#progress").is_visible()
    first.keyboard.press("Escape")
    first.locator("#progress").wait_for(state="hidden")
    # Not after 150 steps.
    asked = {"num_inference_steps": 1, "seed": SEED}
    assert ask(address, "text_to_image", **asked).size == (64, 64)
    assert waiting(address) == 0


def waiting(address: str) -> int:
    with urllib.request.urlopen(f"{address}health", timeout=30) as answer:
        number: int = json.load(answer)["waiting"]
    return number


def test_dropped_files_show_how_they_were_made(address: str, opened: Callable[..., Any]) -> None:
    page = opened(address)
    info = PngInfo()
    info.add_text(
        "parameters",
        f"a boat {MARKUP}\nNegative prompt: {MARKUP}\nSteps: 7, Sampler: DPM++ 2M, Schedule type: "
        f"Karras, CFG scale: 3.5, Seed: {SEED}, Size: 48x96, Model: {MARKUP}, Clip skip: 2",
    )
    file = io.BytesIO()
    Image.new("RGB", (48, 96), "teal").save(file, "PNG", pnginfo=info)
    drop(page, file.getvalue(), f"{MARKUP}.png")
    page.locator("#metadata").get_by_text("a boat").wait_for()
    page.locator("#reuse").click()
    expected = {
        "prompt": f"a boat {MARKUP}",
        "negative_prompt": MARKUP,
        "num_inference_steps": "7",
        "sampler": "dpmpp_2m",
        "timestep_spacing": "karras",
        "guidance_scale": "3.5",
        "seed": SEED,
        "width": "48",
        "height": "96",
        "clip_skip": "1",
    }
    found = {name: page.locator(f"[name={name}]").input_value() for name in expected}
    assert found == expected
    assert MARKUP in page.locator("#problem").inner_text()  # there is no such model
    drop(page, photo(), "plain.png")
    page.locator("#notes").get_by_text("does not say how it was made").wait_for()
    assert page.locator("#reuse").is_disabled()
    assert page.evaluate("window.ran") is None


def test_errors_are_words_at_their_field(address: str, opened: Callable[..., Any]) -> None:
    page = opened(address, errors="status of 422")
    for label, value, words in (
        ("Width", "65", "Width must be a multiple of 4; got 65. The nearest is 64."),
        ("Steps", "999", "Steps may be 150; got 999."),
        ("Images", "0", "This should be greater than or equal to 1"),
        ("Seed", "abc", "Seed must be a whole number; got 'abc'."),
        ("Prompt", "a [cat:dog:0.5]", "[cat:dog:0.5]"),
    ):
        before = field(page, label).input_value()
        field(page, label).fill(value)
        page.keyboard.press("Control+Enter")
        page.locator("#field-problem").wait_for()
        wrong = page.locator("[aria-invalid=true]")
        described = page.locator(f"#{wrong.get_attribute('aria-describedby')}").inner_text()
        assert words in described and "{" not in described
        assert wrong.get_attribute("name") == field(page, label).get_attribute("name")
        assert wrong.evaluate("(field) => field === document.activeElement")
        field(page, label).fill(before)
        assert not page.locator("#field-problem").count()
    field(page, "Prompt").fill("a cat")
    for weight in ("0.5", "1.5"):
        field(page, "Weight").fill(weight)
        page.locator("#lora-add").click()
    assert field(page, "Prompt").input_value() == "a cat <lora:fur:1.5>"
    page.keyboard.press("Control+Enter")
    page.locator("#problem").get_by_text("fur.safetensors").wait_for()
    page.locator("#tab-inpaint").click()
    page.keyboard.press("Control+Enter")
    assert "Choose an image" in page.locator("#field-problem").inner_text()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 401}, "asks for a key"),
        ({"status": 429, "headers": {"Retry-After": "7"}}, "Try again in 7 s"),
        ({"status": 503}, "stopping or starting"),
        ({"status": 500, "body": "Traceback"}, "The server failed"),
        (None, "cannot be reached"),
    ],
)
def test_what_the_server_refuses_is_said_in_words(
    answer: dict[str, Any] | None, words: str, address: str, opened: Callable[..., Any]
) -> None:
    page = opened(address, errors="Failed to load resource")

    def refuse(route: Any) -> None:
        route.abort() if answer is None else route.fulfill(**answer)

    page.route("**/api/text_to_image", refuse)
    page.locator("#make").click()
    page.locator("#problem").get_by_text(words).wait_for()
    page.locator("#progress").wait_for(state="hidden")


def test_keys_alone_will_do(address: str, opened: Callable[..., Any]) -> None:
    """Another tab, an image, a mask and a picture, without a mouse."""
    page = opened(address)

    def tab_to(test: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({test!r})"):
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(outline) != "none"
                return
        raise AssertionError(f"Tab does not reach {test}")

    tab_to("[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-inpaint"
    tab_to("#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "p.png", "mimeType": "image/png", "buffer": photo()})
    page.locator("#mask").wait_for()
    page.locator("#tab-inpaint").focus()
    tab_to("#mask")
    for key in (" ", "ArrowRight", "ArrowRight", " ", "ArrowRight"):
        page.keyboard.press(key)
    tab_to("[name=prompt]")
    page.keyboard.type("a red apple")
    tab_to("[name=num_inference_steps]")
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    asked, made = result(page, lambda: page.keyboard.press("Control+Enter"))
    masked = np.asarray(decoded(asked["mask_image"]))[..., 0]
    assert masked[32, 32] == masked[32, 36] == 255 and masked[32, 50] == 0
    kept = masked == 0
    assert np.array_equal(np.asarray(made)[kept], np.asarray(decoded(asked["image"]))[kept])
    tab_to("#reuse")


def test_a_phone_needs_no_scrolling_sideways(address: str, opened: Callable[..., Any]) -> None:
    page = opened(address, viewport={"width": 360, "height": 640}, has_touch=True)
    field(page, "Prompt").fill("a red apple")
    field(page, "Steps").fill("2")
    result(page, lambda: page.locator("#make").tap())
    page.locator("#more > summary").tap()
    for name in ("text", "image", "inpaint", "outpaint", "colorize", "restore"):
        page.locator(f"#send [data-tab={name}]").tap() if name != "text" else None
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        small = page.evaluate(
            """[...document.querySelectorAll("button, select, input, textarea, summary, a")]
              .filter((one) => one.checkVisibility())
              .filter((one) => Math.min(one.offsetHeight, one.offsetWidth) < 40)
              .map((one) => one.id || one.name)"""
        )
        assert small == []
        if name == "inpaint":
            page.locator("#mask").tap()
            asked, _ = result(page, lambda: page.locator("#make").tap())
            assert np.asarray(decoded(asked["mask_image"]))[32, 32, 0] == 255


def test_it_works_under_a_path_of_a_reverse_proxy(opened: Callable[..., Any]) -> None:
    inner, outer = free_port(), free_port()

    class Proxy(BaseHTTPRequestHandler):
        def forward(self) -> None:
            if not self.path.startswith("/paint/"):
                return self.send_error(404)
            length = int(self.headers.get("Content-Length") or 0)
            upstream = HTTPConnection("127.0.0.1", inner, timeout=120)
            path = self.path.removeprefix("/paint")
            upstream.request(self.command, path, self.rfile.read(length), dict(self.headers))
            answer = upstream.getresponse()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)
            return None

        do_GET = do_POST = forward  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", outer), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with server("--root-path", "/paint", port=inner):
        page = opened(f"http://127.0.0.1:{outer}/paint/")
        field(page, "Steps").fill("1")
        _, made = result(page, lambda: page.locator("#make").click())
        assert made.size == (64, 64)
        drop(page, photo(), "plain.png")
        page.locator("#notes").get_by_text("does not say how it was made").wait_for()
    proxy.shutdown()
