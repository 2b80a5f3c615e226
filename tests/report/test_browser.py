"""The page as a browser shows it, on a phone and on a desk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: that of the system, or playwright's own."""
    system = next((path for name in SYSTEM_BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as running:
        path = system or running.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        # A container's root may not have the kernel's permission for the browser's own sandbox.
        sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0
        opened = running.chromium.launch(executable_path=path, chromium_sandbox=sandbox)
        yield opened
        opened.close()


def opened(browser, path, *, all_open=True, **options):
    """The page, with what its console says and what it asks the network for."""
    tab = browser.new_page(**options)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    if all_open:
        tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    return tab, said, [url for url in asked if not url.startswith(("data:", path.as_uri()))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_is_missing_or_complains(browser, page, width, scheme):
    tab, said, asked = opened(
        browser, page.path, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    wide = tab.evaluate(
        """width => [...document.querySelectorAll('body *')]
            .filter(one => !one.closest('.scroll') || one.matches('.scroll'))
            .filter(one => one.getBoundingClientRect().right > width + 0.5).map(one => one.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide == []
    tab.evaluate("Promise.all([...document.images].map(image => image.decode()))")  # a broken one rejects
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("document.images.length") > 20
    assert (said, asked) == ([], [])
    tab.close()


def test_the_results_fit_a_phone_without_scrolling(browser, page):
    tab, _, _ = opened(browser, page.path, viewport={"width": 390, "height": 900})
    assert tab.evaluate(
        "(() => {const box = document.querySelector('.results').parentElement;"
        "return box.scrollWidth <= box.clientWidth})()"
    )
    tab.close()


CONTRAST = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  for (const one of document.querySelectorAll('body *')) {
    if (![...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(style.color), light(ground(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5 || style.opacity !== '1') poor.push(one.outerHTML.slice(0, 80));
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(browser, page, scheme):
    tab, _, _ = opened(browser, page.path, viewport={"width": 1440, "height": 900}, color_scheme=scheme)
    assert tab.evaluate(CONTRAST) == []
    tab.close()


def test_it_can_be_printed(browser, page):
    tab, _, _ = opened(browser, page.path, viewport={"width": 1440, "height": 900}, color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(tab.pdf(format="A4")) > 50_000
    tab.close()


def test_on_paper_every_chapter_is_open(browser, page):
    """As a reader prints it: nothing was opened by hand. On the screen only CoCoOp's chapter is open."""
    tab, _, _ = opened(browser, page.path, all_open=False, viewport={"width": 1440, "height": 900})
    seen = """() => [...document.querySelectorAll('details.close-up')].map(one =>
        [one.querySelector('h2').textContent.split(' on ')[0],
         one.querySelector('summary').nextElementSibling.checkVisibility({contentVisibilityAuto: true})])"""
    assert tab.evaluate(seen) == [["CoCoOp", True], ["CoOp", False], ["Zero-shot CLIP", False]]
    tab.emulate_media(media="print")
    assert [shown for _, shown in tab.evaluate(seen)] == [True, True, True]
    closed = """() => [...document.querySelectorAll('details:not([open]) table.settings')]
        .every(one => one.checkVisibility({contentVisibilityAuto: true}) && one.getBoundingClientRect().height > 50)"""
    assert tab.evaluate(closed)
    on_screen_only = tab.evaluate("getComputedStyle(document.querySelector('summary')).listStyleType")
    assert on_screen_only == "none"
    tab.close()
