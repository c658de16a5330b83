"""Tries the page of a Serve application in Chromium, without a window, and takes its pictures for the documentation.

    python tests/browser/try_page.py http://127.0.0.1:8000/ ADMIN_TOKEN

Needs Playwright, and the browser of the system (`apt-get install chromium`); `CHROMIUM` names another one.
"""

import json
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

DOCS = Path(__file__).resolve().parents[2] / "docs"
SIZES = {"page.png": (1120, 900), "page-narrow.png": (420, 900)}
PATIENCE = 300_000  # milliseconds
LAYERS, QUESTION = 30, "What is the capital of France?"


def settings(address: str, token: str) -> dict:
    """Returns the settings in force, as the server says."""
    asked = urllib.request.Request(f"{address}sere/settings", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)["settings"]


def ask(page: Page) -> None:
    page.locator("#prompt").fill(QUESTION)
    page.locator("#tokens").fill("60")
    page.locator("#others").fill("15")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#verdict")).to_have_text(re.compile("answers"), timeout=PATIENCE)


def try_page(page: Page, address: str, token: str) -> None:
    page.goto(address)
    expect(page.locator("#model")).to_have_text("smollm2-moe")
    expect(page.locator("#closed")).to_contain_text("can be changed with the admin token")
    assert page.locator("#sliders input").count() == 0

    page.goto("about:blank")  # an address that differs behind the # alone loads nothing
    page.goto(f"{address}#token={token}")
    slider = page.locator("#select_top_k")
    expect(slider).to_be_visible()
    assert page.url == address, "the token stays out of the history"

    ask(page)
    for side in ("off", "on"):
        assert page.locator(f"#text-{side}").inner_text().strip()
        assert re.fullmatch(r"[\d.]+ tokens/s", page.locator(f"#speed-{side}").inner_text())
    assert page.locator("#chart rect").count() == 2 * LAYERS
    before, experts, after = re.findall(r"[\d.]+", page.locator("#active").inner_text())
    assert 0 < float(after) < float(before) <= float(experts)
    print(page.locator("#verdict").inner_text(), "|", page.locator("#active").inner_text())
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is cut off"
        page.screenshot(path=DOCS / name, full_page=True)

    slider.focus()
    for key in ("End", "ArrowLeft"):  # the model's top-k, and one less
        slider.press(key)
    expect(page.locator("output").first).to_have_text("7")
    page.wait_for_function("document.getElementById('error').textContent === ''")
    for _ in range(100):
        if settings(address, token)["select_top_k"] == 7:
            break
        page.wait_for_timeout(200)
    assert settings(address, token)["select_top_k"] == 7


def main(address: str, token: str) -> None:
    with sync_playwright() as playwright:
        executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light", device_scale_factor=1.5)
        wrong, asked = [], set()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.add(request.url.split("?")[0]))
        try_page(page, address, token)
        browser.close()
    assert not wrong, wrong
    assert all(url.startswith((address, "about:")) for url in asked), f"it asked others: {asked}"
    print("the page works")


if __name__ == "__main__":
    main(*sys.argv[1:])
