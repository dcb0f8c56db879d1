"""A real browser for the tests of the page: headless Chromium, its complaints, and simple accessibility checks."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")


def missing(why: str) -> NoReturn:
    """Skip, but fail where everything has to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium; NNDEFENSE_CHROMIUM names another one than the first on the path."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the page is tested with playwright: pip install playwright")
    named = os.environ.get("NNDEFENSE_CHROMIUM")
    found = named or next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        missing("no Chromium is on the path: install it, or set NNDEFENSE_CHROMIUM to its program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(browser: Any, url: str, width: int = 1200, height: int = 900, **options: Any) -> Iterator[Any]:
    """A fresh page at an address; it ends with an error if the page asked elsewhere or complained.

    ``page.complaints`` holds what the console and the page's errors said, and may be emptied by a test that expects it.
    """
    options = {"color_scheme": "light", "reduced_motion": "reduce", **options}
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    elsewhere: list[str] = []
    page.complaints = complaints
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else 0)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((url, "data:", "blob:")) else elsewhere.append(one.url))
    try:
        page.goto(url)
        yield page
        assert not complaints
        assert not elsewhere
    finally:
        context.close()


# Text in an element's own text nodes, its colour, and the first opaque background behind it.
_TEXTS = """() => {
  const parse = (text) => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a: a ?? 1 };
  };
  const light = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest(".unseen, .skip, :disabled")) continue;
    const style = getComputedStyle(element);
    let behind = element;
    while (behind && parse(getComputedStyle(behind).backgroundColor).a < 1) behind = behind.parentElement;
    const front = light(parse(style.color));
    const back = light(parse(getComputedStyle(behind ?? document.documentElement).backgroundColor));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push({ text: text.slice(0, 40), ratio, size: parseFloat(style.fontSize), weight: Number(style.fontWeight) });
  }
  return found;
}"""

# What a person who hears the page needs; each rule gives the elements that break it.
_RULES = """() => {
  const all = (css) => [...document.querySelectorAll(css)];
  const seen = (element) => element.checkVisibility();
  const text = (ids) => ids.split(/\\s+/).map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
  const name = (element) => (element.getAttribute("aria-label")
    || (element.getAttribute("aria-labelledby") && text(element.getAttribute("aria-labelledby")))
    || [...(element.labels ?? [])].map((l) => l.textContent).join(" ")
    || [...element.querySelectorAll("img")].map((i) => i.alt).join(" ") + element.textContent).trim();
  const ids = all("[id]").map((element) => element.id);
  const levels = all("h1, h2, h3, h4").filter(seen).map((element) => Number(element.tagName[1]));
  const broken = {
    language: document.documentElement.lang ? [] : ["html"],
    title: document.title ? [] : ["title"],
    names: all("button, input, select, a").filter((element) => seen(element) && !name(element)),
    alternatives: all("img").filter((image) => seen(image) && !image.alt),
    ids: ids.filter((id, place) => ids.indexOf(id) !== place),
    references: all("[aria-labelledby], [aria-describedby], label[for]").filter((element) => ["aria-labelledby",
      "aria-describedby", "for"].some((key) => (element.getAttribute(key) ?? "").split(/\\s+/).filter(Boolean)
      .some((id) => !document.getElementById(id)))),
    headings: levels.filter((level, place) => place > 0 && level > levels[place - 1] + 1),
    one: levels.filter((level) => level === 1).length === 1 ? [] : ["h1"],
    order: all("[tabindex]").filter((element) => element.tabIndex > 0),
    targets: all("button, input, select, summary").filter((element) => {
      const box = (element.closest("label") ?? element).getBoundingClientRect();
      return seen(element) && (box.width < 24 || box.height < 24);
    }),
    styles: all("[style]").filter((element) => [...element.style].some((key) => !key.startsWith("--"))),
    scripts: all("script:not([src]), style"),
    tables: all("table").filter((table) => seen(table) && !(table.caption && table.querySelector("th[scope=row]"))),
  };
  return Object.entries(broken).filter(([, found]) => found.length)
    .map(([rule, found]) => `${rule}: ${found.map((one) => one.outerHTML?.slice(0, 90) ?? one).join(" | ")}`);
}"""


def faint(page: Any) -> list[str]:
    """Visible text whose contrast is below WCAG 2.2 AA: 4.5, or 3 for large text."""
    texts = page.evaluate(_TEXTS)
    assert len(texts) > 10
    return [
        f"{one['text']!r}: {one['ratio']:.2f}"
        for one in texts
        if one["ratio"] < (3 if one["size"] >= 24 or (one["size"] >= 18.66 and one["weight"] >= 700) else 4.5)
    ]


def barriers(page: Any) -> list[str]:
    """What would stop somebody who hears the page, or uses it by keys or with large fingers."""
    found: list[str] = page.evaluate(_RULES)
    return found


def sideways(page: Any) -> int:
    """By how many pixels the page is wider than the window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return wider


# Words of which a part stands on another line: a break is for spaces and hyphens alone.
_BROKEN = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const around = node.parentElement;
    if (!around.checkVisibility({ visibilityProperty: true }) || around.closest("select, code")) continue;
    for (const { 0: word, index } of node.data.matchAll(/[^\\s\u00a0/·-]+/g)) {
      const range = document.createRange();
      range.setStart(node, index);
      range.setEnd(node, index + word.length);
      const boxes = [...range.getClientRects()].filter((box) => box.width > 0);
      const lines = new Set(boxes.map((box) => Math.round(box.top)));
      if (lines.size > 1) found.push(word);
    }
  }
  return found;
}"""


def broken_words(page: Any) -> list[str]:
    """Visible words that are broken where they have neither a space nor a hyphen."""
    found: list[str] = page.evaluate(_BROKEN)
    return found
