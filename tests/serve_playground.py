"""The playground in headless Chromium: upload, compare, perturb, by mouse and by keyboard.

    python serve_playground.py http://127.0.0.1:8080 PICTURE [FOLDER for screenshots]

The server is `radapt serve --compare --perturb --on-suspect flag`. Chromium is the one on the PATH,
or RADAPT_CHROMIUM.
"""

import os
import shutil
import sys

from playwright.sync_api import expect, sync_playwright

url, picture = sys.argv[1:3]
shots = sys.argv[3] if len(sys.argv) > 3 else None
chromium = os.environ.get("RADAPT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not chromium:
    print("no Chromium")
    sys.exit(77)


def shot(page, name):
    if shots:
        page.screenshot(path=f"{shots}/{name}.png", full_page=True)


def answered(page):
    for side in ("defended", "undefended"):
        expect(page.locator(f"#{side}-end")).to_contain_text("tokens", timeout=60_000)
    assert page.locator("#defended-text").inner_text().strip()
    assert page.locator("#undefended-text").inner_text().strip()


def drive(browser, name, **context):
    page = browser.new_context(**context).new_page()
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator("#defense")).to_contain_text("GIF")
    shot(page, f"{name}-start")
    page.set_input_files("#file", picture)
    expect(page.locator("#picture")).to_be_visible()

    page.locator("#question").press("Control+Enter")
    answered(page)
    expect(page.locator("#suspicion")).to_contain_text("not suspicious")
    clean = page.locator("#undefended-text").inner_text()

    # By keyboard alone: the slider to 16/255, the button.
    page.locator("#eps").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#eps-shown")).to_have_text("16/255")
    page.locator("#attack").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_be_visible()
    expect(page.locator("#crafted")).to_be_visible(timeout=120_000)
    expect(page.locator("#magnified")).to_be_visible()
    expect(page.locator("#facts")).to_contain_text("16/255, transfer")
    assert page.locator("input[name=asked][value=crafted]").is_checked()
    page.locator("#ask").click()
    answered(page)
    attacked = page.locator("#undefended-text").inner_text()
    assert attacked != clean, f"the undefended model still says {attacked!r}"
    expect(page.locator("#suspicion")).to_contain_text(": suspicious")
    expect(page.locator("#status")).to_contain_text(attacked)
    shot(page, f"{name}-attacked")

    # A picture of the model's own world.
    page.locator("#sample").click()
    expect(page.locator("#crafted")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("pocket world")
    page.set_input_files("#file", picture)

    # The threat model is part of what is said.
    page.locator("input[name=threat][value=adaptive]").check()
    page.locator("#attack").click()
    expect(page.locator("#facts")).to_contain_text("16/255, adaptive", timeout=120_000)

    # A picture that is none is refused in the server's words, and the page goes on.
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.locator("#ask").click()
    expect(page.locator("#alert")).to_be_in_viewport()
    shot(page, f"{name}-refused")
    page.set_input_files("#file", picture)
    page.locator("#ask").click()
    answered(page)
    expect(page.locator("#alert")).to_be_hidden()

    over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert over <= 0, f"{name}: {over} pixels too wide"
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, img")].filter((e) =>
             !(e.labels && e.labels.length) && !e.getAttribute("alt") && !e.textContent.trim() && !e.ariaLabel
           ).map((e) => e.id)"""
    )
    assert not unnamed, f"without a name: {unnamed}"
    outside = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not outside, f"asked elsewhere: {outside}"
    expected = [text for text in wrong if "status of 400" in text]
    assert wrong == expected, wrong
    print(f"{name}: {clean!r}, attacked {attacked!r}")


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    drive(browser, "desktop", viewport={"width": 1280, "height": 900}, color_scheme="light")
    drive(browser, "desktop-dark", viewport={"width": 1280, "height": 900}, color_scheme="dark")
    phone = playwright.devices["Pixel 5"]
    drive(browser, "phone", **phone, color_scheme="light")
    drive(browser, "phone-dark", **phone, color_scheme="dark")
    browser.close()
