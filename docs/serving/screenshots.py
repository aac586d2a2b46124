"""The pictures of docs/serving.md: the page of `alitok-fast serve`, in Chromium.

python docs/serving/screenshots.py     # needs the packages of the extras `serve` and `test`, and Chromium
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

HERE = Path(__file__).parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
CLASSES = "class=8&class=9&class=3&class=5"
# The demo draws a picture in a few milliseconds. To be seen while they grow, most pictures here never get finished:
# their last event is left out, and the stream stays open.
UNFINISHED = """
const ask = window.fetch;
let finished = 0;
window.fetch = async (...request) => {
  const response = await ask(...request);
  if (!response.headers.get("content-type").startsWith("text/event-stream")) return response;
  let rest = "";
  const some = new TransformStream({
    transform: (text, out) => {
      const events = (rest + text).split("\\n\\n");
      rest = events.pop();
      for (const event of events) {
        const kept = event.includes("partial_image") || (event.includes("completed") && finished++ < 5);
        if (kept) out.enqueue(event + "\\n\\n");
      }
    },
    flush: () => new Promise(() => {}),
  });
  const body = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(some);
  return new Response(body.pipeThrough(new TextEncoderStream()), {headers: response.headers});
};
"""


@contextmanager
def server() -> Iterator[str]:
    """The address of a server with the demo model."""
    command = [sys.executable, "-u", "-m", "alitok_fast.cli", "serve", "--port", "0", "--max-images", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
            yield address
        finally:
            process.terminate()


def opened(browser: Browser, url: str, width: int, height: int, script: str = "", **options: object) -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    if script:
        page.add_init_script(script)
    page.goto(url)
    expect(page.locator("#app")).to_be_visible(timeout=60_000)
    return page


def done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile("pictures? in"), timeout=60_000)


def main() -> None:
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = opened(browser, f"{address}/#mode=generate&{CLASSES}&seed=0&n=4", 1200, 860)
        done(page)
        page.screenshot(path=HERE / "page.png")

        page = opened(browser, f"{address}/#mode=generate&{CLASSES}&seed=0&n=4", 1200, 860, UNFINISHED)
        expect(page.locator("figure[data-state=done]")).to_have_count(5, timeout=60_000)
        expect(page.locator("figure[data-state=growing]").nth(3)).to_be_visible(timeout=60_000)
        page.screenshot(path=HERE / "growing.png")

        phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2, "color_scheme": "dark"}
        page = opened(browser, f"{address}/#mode=compare&{CLASSES}&seed=1&seeds=3", 360, 720, **phone)
        done(page)
        page.locator("#results").evaluate("results => scrollBy(0, results.getBoundingClientRect().top - 200)")
        page.screenshot(path=HERE / "phone.png")
        browser.close()


if __name__ == "__main__":
    main()
