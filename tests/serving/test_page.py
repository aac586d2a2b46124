"""The page at `/`, in a browser, on the real service with the demo model."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from PIL import Image

from alitok_fast import Pipeline, load_tokenizer
from alitok_fast.data.transforms import centre_crop, to_tensor
from alitok_fast.models import Tokenizer
from alitok_fast.models.loading import find_stage1

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

from alitok_fast.serving.app import create_app  # noqa: E402
from alitok_fast.serving.connections import Server  # noqa: E402
from alitok_fast.serving.settings import API_KEYS, ServeSettings  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 30_000  # milliseconds that a condition may take on a busy machine
expect = sync_api.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"Chromium is not at {CHROMIUM}"),
]

# What an image or a canvas shows, as RGBA.
PIXELS = """element => {
  const canvas = document.createElement("canvas");
  canvas.width = element.naturalWidth || element.width;
  canvas.height = element.naturalHeight || element.height;
  const context = canvas.getContext("2d");
  context.drawImage(element, 0, 0);
  const {data, width, height} = context.getImageData(0, 0, canvas.width, canvas.height);
  return {width, height, data: Array.from(data)};
}"""
TARGETS = "button, a, summary, select, input:not([type=radio], [type=checkbox]), .modes label, .own, [role=option]"
SMALL_TARGETS = """targets => targets
  .map(target => ({name: target.outerHTML.slice(0, 80), box: target.getBoundingClientRect()}))
  .filter(({box}) => box.width && box.height && (box.width < 43.9 || box.height < 43.9))
  .map(({name, box}) => `${name}: ${box.width} x ${box.height}`)"""


# ---- a server, and a browser that looks at it ----


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("demo")


@pytest.fixture(scope="module")
def stage1() -> Tokenizer:
    return load_tokenizer(find_stage1("demo"))


@contextlib.contextmanager
def running(pipe: Pipeline, stage1: Tokenizer | None, **settings: Any) -> Iterator[SimpleNamespace]:
    """A server on a free port of this machine: its address, and the application."""
    chosen = ServeSettings(port=0, **settings)
    app = create_app(lambda: (pipe, stage1), chosen)
    server = Server(app, chosen, host=chosen.host, port=chosen.port, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started and app.state.ready)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", app=app)
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for a condition on this side; the browser's are waited for by Playwright."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(pipe: Pipeline, stage1: Tokenizer) -> Iterator[SimpleNamespace]:
    with running(pipe, stage1) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Any]:
    """new_page(**options) -> a page of its own, whose `complaints` and `asked` are in the namespace beside it."""
    contexts = []

    def make(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.asked = [], []
        page.on("console", lambda said: said.type in ("error", "warning") and page.complaints.append(said.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page: Any, server: SimpleNamespace) -> Any:
    """The page, ready; afterwards it must have had nothing to complain about."""
    page = new_page()
    open_page(page, server.url)
    yield page
    assert [text for text in page.complaints if "status of 400" not in text] == []  # refused requests are logged


def open_page(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#app")).to_be_visible()


def finished(page: Any, pictures: int) -> None:
    """Wait until so many pictures are there, and no more are being made."""
    expect(page.locator("#status")).to_have_text(re.compile(rf"^{pictures} pictures? in"))
    expect(page.locator("figure img")).to_have_count(pictures)


def pixels(locator: Any) -> np.ndarray:
    shown = locator.evaluate(PIXELS)
    return np.array(shown["data"], dtype=np.uint8).reshape(shown["height"], shown["width"], 4)


def pictures(page: Any) -> np.ndarray:
    return np.stack([pixels(image)[..., :3] for image in page.locator("figure img").all()])


def choose(page: Any, *names: str) -> None:
    """Exactly these classes, through the picker."""
    page.get_by_role("button", name="Clear").click()
    for name in names:
        page.get_by_role("combobox").fill(name)
        page.get_by_role("option", name=re.compile(rf"^\d+\s*{name}$")).click()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")


def generate(page: Any) -> None:
    page.locator("#go").click()


@pytest.fixture
def held(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine stands still as soon as it has shown the first rows of anything, until the test ends."""
    engine, release, once = server.app.state.service.engine, threading.Event(), threading.Event()
    submit = engine.submit

    def holding(label: Any, params: Any, *, on_rows: Any, **options: Any) -> Any:
        def show(rows: int, picture: np.ndarray) -> None:
            on_rows(rows, picture)
            if not once.is_set():
                once.set()
                engine.call(release.wait)

        return submit(label, params, on_rows=show, **options)

    monkeypatch.setattr(engine, "submit", holding)
    server.release = release
    yield
    release.set()
    until(lambda: engine.stats().running == 0 and engine.stats().queue_length == 0)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey shape on black, wider than high."""
    rows, columns = np.mgrid[:48, :64]
    grey = np.where((abs(rows - 24) < 14) & (abs(columns - 32) < 12 + rows / 6), 190, 0).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "shape.png"
    Image.fromarray(np.stack([grey] * 3, -1)).save(path)
    return path


# ---- generating ----


def test_it_loads_from_its_own_server_alone(page: Any, server: SimpleNamespace) -> None:
    generate(page)
    finished(page, 4)
    strangers = [url for url in page.asked if not url.startswith((server.url, "data:", f"blob:{server.url}"))]
    assert strangers == []
    assert page.complaints == []


def test_its_pictures_are_those_of_the_pipeline(page: Any, pipe: Pipeline) -> None:
    choose(page, "bag", "ankle boot")
    page.locator("#seed").fill("7")
    page.locator("#n").fill("3")
    generate(page)
    finished(page, 6)
    wanted = pipe(["bag"] * 3 + ["ankle boot"] * 3, seed=7, image_ids=[0, 1, 2] * 2).pixels
    np.testing.assert_array_equal(pictures(page), wanted)
    expect(page.locator("figcaption").nth(4)).to_contain_text("ankle bootseed 7, image 1")
    assert page.locator("figure img").first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_settings_reach_the_sampler(page: Any, pipe: Pipeline) -> None:
    choose(page, "coat")
    page.locator("summary").click()
    page.get_by_label("Guidance scale, slider").fill("1.5")
    page.locator("#temperature").fill("0.8")
    page.locator("#top_k").fill("50")
    page.locator("#top_p").fill("0.9")
    page.locator("#guidance_power").fill("2")
    page.get_by_role("checkbox", name="Guidance power").check()  # back to the model's own
    page.locator("#image_id").fill("5")
    page.locator("#n").fill("1")
    generate(page)
    finished(page, 1)
    wanted = pipe(["coat"], image_ids=[5], guidance_scale=1.5, temperature=0.8, top_k=50, top_p=0.9).pixels
    np.testing.assert_array_equal(pictures(page), wanted)


def test_a_downloaded_png_is_the_picture(page: Any, pipe: Pipeline) -> None:
    choose(page, "bag")
    page.locator("#n").fill("1")
    generate(page)
    finished(page, 1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG: bag, seed 0, image 0").click()
    assert download.value.suggested_filename == "bag-seed-0-image-0.png"
    file = Image.open(download.value.path())
    np.testing.assert_array_equal(np.asarray(file), pipe(["bag"], seed=0).pixels[0])
    assert '"label": 8' in file.text["alitok_fast"]


def test_pictures_grow_row_by_row(page: Any, held: None) -> None:
    page.get_by_role("button", name="All").click()
    generate(page)
    growing = page.locator("figure[data-state=growing]").first
    expect(growing).to_be_visible()
    rows = int(growing.get_attribute("data-rows"))
    assert 1 <= rows < 8
    opaque = pixels(growing.locator("canvas"))[..., 3] == 255
    assert opaque[: 4 * rows].all() and not opaque[4 * rows :].any()
    expect(page.locator("#shown")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("status")).to_have_text("Making 40 pictures.")


def test_cancelling_frees_the_server(page: Any, held: None, server: SimpleNamespace) -> None:
    engine = server.app.state.service.engine
    before = engine.stats().requests["cancelled"]
    page.get_by_role("button", name="All").click()
    page.locator("#n").fill("10")
    generate(page)
    expect(page.locator("figure[data-state=growing]").first).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text(re.compile(r"^0 of 100 pictures in .*, then cancelled\.$"))
    expect(page.locator("figure[data-state=failed]")).to_have_count(100)
    expect(page.locator("#go")).to_be_focused()
    server.release.set()
    until(lambda: engine.stats().sequences_in_use == 0 and engine.stats().queue_length == 0)
    assert engine.stats().requests["cancelled"] - before >= 20  # two requests were under way


def test_seeds_are_compared_in_a_table(page: Any, pipe: Pipeline) -> None:
    choose(page, "bag", "dress")
    page.get_by_role("radio", name="Compare seeds").check()
    page.locator("#seed").fill("3")
    page.locator("#seeds").fill("3")
    generate(page)
    finished(page, 6)
    assert page.locator("thead th").all_inner_texts() == ["Class", "Seed 3", "Seed 4", "Seed 5"]
    assert page.locator("tbody th").all_inner_texts() == ["bag", "dress"]
    wanted = [pipe([label], seed=seed).pixels[0] for label in ("bag", "dress") for seed in (3, 4, 5)]
    np.testing.assert_array_equal(pictures(page), wanted)


def test_without_a_painter_the_pictures_come_at_once(new_page: Any, pipe: Pipeline) -> None:
    with running(pipe, None) as server:
        page = new_page()
        open_page(page, server.url)
        generate(page)
        finished(page, 4)
        np.testing.assert_array_equal(pictures(page), pipe([0] * 4, seed=0).pixels)
        assert page.complaints == []


# ---- links ----


def test_a_link_gives_the_same_pictures(page: Any, new_page: Any) -> None:
    choose(page, "sandal", "shirt")
    page.locator("#seed").fill("-9007199254740991")
    page.locator("#n").fill("2")
    page.locator("summary").click()
    page.locator("#top_p").fill("0.95")
    generate(page)
    finished(page, 4)
    fields = parse_qs(page.url.partition("#")[2])
    assert fields == {"mode": ["generate"], "class": ["5", "6"], "seed": ["-9007199254740991"], "n": ["2"],
                      "top_p": ["0.95"], "model": ["demo"]}  # fmt: skip
    other = new_page()
    open_page(other, page.url)
    finished(other, 4)
    np.testing.assert_array_equal(pictures(other), pictures(page))
    assert other.locator("#chips button").all_inner_texts() == ["sandal", "shirt"]
    expect(other.locator("#top_p")).to_have_value("0.95")


def test_back_shows_what_was_before(page: Any) -> None:
    for seed in ("1", "2"):
        page.locator("#seed").fill(seed)
        generate(page)
        finished(page, 4)
        expect(page.locator("figcaption").first).to_contain_text(f"seed {seed}, image 0")
    page.go_back()
    expect(page.locator("#seed")).to_have_value("1")
    expect(page.locator("figcaption").first).to_contain_text("seed 1, image 0")
    finished(page, 4)
    page.go_back()
    expect(page.locator("figure")).to_have_count(0)


def test_back_to_the_beginning_ends_what_runs(page: Any, held: None) -> None:
    page.get_by_role("button", name="All").click()
    generate(page)
    expect(page.locator("figure[data-state=growing]").first).to_be_visible()
    page.go_back()
    expect(page.locator("figure")).to_have_count(0)
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#shown")).not_to_have_attribute("aria-busy", "true")
    page.wait_for_timeout(300)  # in which the requests end
    expect(page.locator("#status")).to_have_text("")


def test_the_last_seed_is_one_that_a_browser_counts_to(page: Any) -> None:
    page.evaluate("() => { location.hash = '#mode=compare&class=0&seed=9007199254740991&seeds=2' }")
    expect(page.locator("#seed-error")).to_contain_text("The last seed is too large for a browser.")


def test_the_link_of_a_picture_shows_it_alone(page: Any) -> None:
    generate(page)
    finished(page, 4)
    third = pictures(page)[2]
    page.get_by_role("link", name="t-shirt seed 0, image 2").click()
    finished(page, 1)
    np.testing.assert_array_equal(pictures(page)[0], third)


def test_the_link_can_be_copied(new_page: Any, server: SimpleNamespace) -> None:
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    open_page(page, server.url)
    generate(page)
    finished(page, 4)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#status")).to_have_text("Link copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == page.url


# ---- faults ----


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("top_p", "1.5", "Input should be less than or equal to 1, got 1.5."),
        ("top_k", "2.5", "Input should be a valid integer"),
        ("n", "11", "Expected at most 10, got 11."),
        ("seed", "9007199254740993", "Enter a whole number from -9007199254740991 to 9007199254740991."),
        ("image_id", "", "Enter a number."),
        ("image_id", "9007199254740990", "The last image's number is too large for a browser."),
    ],
)
def test_a_fault_is_shown_at_its_field(page: Any, name: str, value: str, says: str) -> None:
    page.locator("summary").click()
    field = page.locator(f"#{name}")
    field.fill(value)
    page.locator("summary").click()
    generate(page)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    expect(page.locator(f"#{name}-error")).to_contain_text(says)
    assert f"{name}-error" in field.get_attribute("aria-describedby").split()
    expect(field).to_be_visible()
    field.fill("1")
    generate(page)
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    expect(page.locator("#status")).to_have_text(re.compile(r"pictures? in"))


def test_no_class_is_a_fault_of_the_picker(page: Any) -> None:
    page.get_by_role("button", name="Clear").click()
    generate(page)
    expect(page.locator("#prompt-error")).to_have_text("Choose at least one class.")
    expect(page.get_by_role("combobox")).to_be_focused()


def test_a_file_that_is_no_picture_is_a_fault_of_the_photograph(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.locator("#image").set_input_files(tmp_path / "notes.png")
    expect(page.locator("#image-error")).not_to_be_empty()
    expect(page.locator("#image")).to_have_attribute("aria-invalid", "true")


def test_it_waits_for_a_server_that_is_busy(page: Any) -> None:
    answers = iter([{"error": {"message": "queue: full", "param": None, "code": "queue_full"}}])

    def busy_once(route: Any) -> None:
        answer = next(answers, None)
        route.continue_() if answer is None else route.fulfill(status=503, json=answer)

    page.route("**/v1/images/generations", busy_once)
    generate(page)
    finished(page, 4)
    expect(page.locator("#fault")).to_be_empty()
    page.complaints.clear()  # the refusal


def test_a_server_that_is_gone_is_named(page: Any) -> None:
    page.route("**/v1/images/generations", lambda route: route.abort())
    generate(page)
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached, or it ended the connection.")
    expect(page.locator("figure[data-state=failed]")).to_have_count(4)
    page.complaints.clear()


def test_a_picture_that_fails_says_why_and_the_others_go_on(
    page: Any, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.app.state.service.engine
    submit = engine.submit

    def failing(label: Any, params: Any, *, image_id: int, **options: Any) -> Any:
        if image_id != 1:
            return submit(label, params, image_id=image_id, **options)
        broken: Future[Any] = Future()
        broken.set_exception(RuntimeError("sampling: expected finite logits, got NaN"))
        return broken

    monkeypatch.setattr(engine, "submit", failing)
    generate(page)
    expect(page.locator("figure").nth(1)).to_contain_text("Sampling: expected finite logits, got NaN.")
    expect(page.locator("#status")).to_have_text(re.compile(r"^3 of 4 pictures in [\d.]+ s\.$"))
    expect(page.locator("figure img")).to_have_count(3)


# ---- keyboard and phone ----


def test_it_works_by_keyboard_alone(page: Any, pipe: Pipeline) -> None:
    keyboard = page.keyboard
    for _ in range(20):  # from the top of the page to the picker
        if page.evaluate("() => document.activeElement.id") == "prompt":
            break
        keyboard.press("Tab")
    combobox = page.get_by_role("combobox")
    expect(combobox).to_be_focused()
    assert combobox.evaluate("element => getComputedStyle(element).outlineStyle") != "none"
    keyboard.press("Backspace")  # removes the class that is chosen at first
    keyboard.press("ArrowDown")
    expect(combobox).to_have_attribute("aria-expanded", "true")
    expect(combobox).to_have_attribute("aria-activedescendant", "option-0")
    keyboard.press("ArrowUp")  # round to the last
    expect(combobox).to_have_attribute("aria-activedescendant", "option-9")
    keyboard.press("Enter")
    expect(page.locator("#option-9")).to_have_attribute("aria-selected", "true")
    keyboard.press("Escape")
    expect(page.get_by_role("listbox")).to_be_hidden()
    keyboard.type("ba")
    expect(combobox).to_have_attribute("aria-activedescendant", "option-8")
    keyboard.press("Enter")
    expect(combobox).to_have_value("")
    keyboard.press("Enter")  # nothing is open: this starts
    finished(page, 8)
    expect(page.get_by_role("status")).to_contain_text("8 pictures in")
    np.testing.assert_array_equal(pictures(page), pipe([9] * 4 + [8] * 4, image_ids=[*range(4)] * 2).pixels)


@pytest.mark.parametrize("mode", ["generate", "compare", "complete", "reconstruct"])
def test_it_fits_a_phone(new_page: Any, server: SimpleNamespace, photo: Path, mode: str) -> None:
    page = new_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    open_page(page, server.url)
    page.locator(f"[name=mode][value={mode}]").check()
    if mode in ("complete", "reconstruct"):
        page.locator("#image").set_input_files(photo)
    if mode != "reconstruct":
        page.get_by_role("button", name="All").click()
        page.locator("summary").click()
        page.get_by_role("combobox").click()
        expect(page.get_by_role("option").first).to_be_visible()
        assert page.locator(TARGETS).evaluate_all(SMALL_TARGETS) == []
        page.keyboard.press("Escape")
        generate(page)
    expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ pictures? in"))
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    assert page.locator(TARGETS).evaluate_all(SMALL_TARGETS) == []


def test_a_thousand_classes_can_be_searched(new_page: Any, server: SimpleNamespace) -> None:
    page = new_page()
    names = [f"kind {number}" for number in range(1000)]
    names[134] = names[517] = "crane"  # two classes of ImageNet have this name

    def with_names(route: Any) -> None:
        answer = route.fetch()
        models = answer.json()
        models["data"][0]["classes"] = names
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", with_names)
    open_page(page, server.url)
    combobox = page.get_by_role("combobox")
    combobox.click()
    expect(page.get_by_role("option")).to_have_count(1000)
    combobox.fill("crane")
    found = [text.split() for text in page.get_by_role("option").all_inner_texts()]
    assert found == [["134", "crane"], ["517", "crane"]]
    combobox.fill("99")
    expect(page.get_by_role("option").first).to_contain_text("kind 99")
    expect(page.get_by_role("button", name="All")).to_be_hidden()


def test_motion_is_left_out_where_it_is_not_wanted(new_page: Any, server: SimpleNamespace, held: None) -> None:
    names = []
    for wish in ("reduce", "no-preference"):
        page = new_page(reduced_motion=wish)
        open_page(page, server.url)
        generate(page)
        waiting = page.locator("figure[data-state=waiting] .frame").last
        names.append(waiting.evaluate("frame => getComputedStyle(frame).animationName"))
    assert names == ["none", "breathe"]


# ---- photographs ----


def crop(photo: Path, pipe: Pipeline) -> np.ndarray:
    return centre_crop(np.asarray(Image.open(photo)), pipe.tokenizer.config.image_size)


def test_a_chosen_photograph_is_reconstructed(page: Any, pipe: Pipeline, photo: Path) -> None:
    page.get_by_role("radio", name="Reconstruct").check()
    page.locator("#image").set_input_files(photo)
    finished(page, 1)
    tokens = pipe.tokenizer.encode(to_tensor(crop(photo, pipe)[None]))
    wanted = np.asarray((pipe.image_decoder(tokens)[0].permute(1, 2, 0) * 255).round().byte())
    np.testing.assert_allclose(pictures(page)[0].astype(int), wanted, atol=1)
    for canvas in ("#shown canvas", "#preview canvas"):  # the server's crop, not the browser's
        np.testing.assert_array_equal(pixels(page.locator(canvas))[..., :3], crop(photo, pipe))
    caption = page.locator("figcaption").last.inner_text()
    error = np.mean((pictures(page)[0] / 255.0 - crop(photo, pipe) / 255.0) ** 2)
    assert float(re.search(r"PSNR ([\d.]+) dB", caption)[1]) == pytest.approx(-10 * np.log10(error), abs=0.01)


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_photograph_comes_by_drop_and_paste(page: Any, photo: Path, how: str) -> None:
    page.evaluate(
        """([how, encoded]) => {
          const bytes = Uint8Array.from(atob(encoded), letter => letter.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], "shape.png", {type: "image/png"}));
          const event = how === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
          document.body.dispatchEvent(event);
        }""",
        [how, base64.b64encode(photo.read_bytes()).decode()],
    )
    finished(page, 1)
    expect(page.locator("#image-name")).to_have_text("shape.png")
    expect(page.locator("[name=mode][value=reconstruct]")).to_be_checked()


def test_a_photograph_is_completed(page: Any, pipe: Pipeline, photo: Path) -> None:
    page.get_by_role("radio", name="Complete").check()
    generate(page)
    expect(page.locator("#image-error")).to_contain_text("Choose a photograph first")
    page.locator("#image").set_input_files(photo)
    choose(page, "bag")
    page.get_by_label("Rows kept, slider").fill("3")
    page.locator("#n").fill("2")
    generate(page)
    finished(page, 2)
    config = pipe.tokenizer.config
    tokens = pipe.tokenizer.encode(to_tensor(crop(photo, pipe)[None]))[:, : config.num_prefix_tokens + 3 * config.grid]
    wanted = pipe(["bag", "bag"], prompt_tokens=tokens.repeat(2, 1)).pixels
    np.testing.assert_array_equal(pictures(page), wanted)
    expect(page.locator("figcaption").first).to_have_text("Photograph: 3 of 8 rows kept")


# ---- keys ----


def test_a_key_is_asked_for_and_kept(new_page: Any, pipe: Pipeline, stage1: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setenv(API_KEYS, "right-key")
    with running(pipe, stage1) as server:
        page = new_page()
        page.goto(server.url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.locator("#app")).to_be_hidden()
        field.fill("wrong-key")
        field.press("Enter")
        expect(page.locator("#key-error")).to_have_text("This key is not accepted.")
        expect(field).to_have_attribute("aria-invalid", "true")
        field.fill("right-key")
        field.press("Enter")
        expect(page.locator("#app")).to_be_visible()
        expect(page.locator("#locked")).to_be_hidden()
        generate(page)
        finished(page, 4)
        page.reload()
        finished(page, 4)  # the key is still there, and so is the link
        assert "right-key" not in page.url
        assert [text for text in page.complaints if "status of 401" not in text] == []


def test_a_key_is_not_asked_for_where_none_is_needed(page: Any) -> None:
    expect(page.locator("#locked")).to_be_hidden()


def test_screenshots_of_the_docs_are_small() -> None:
    folder = Path(__file__).resolve().parents[2] / "docs" / "serving"
    for name in ("page.png", "growing.png", "phone.png"):
        file = (folder / name).read_bytes()
        assert len(file) < 300_000
        Image.open(io.BytesIO(file)).verify()
