"""The frame of every report: one HTML document with its style inside, which runs no script and opens no connection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources

from nndefense.reporting.wording import escape, short


def page(
    title: str, sections: Iterable[str], *, facts: Sequence[str] = (), lead: str = "", description: str | None = None
) -> str:
    """A whole page.

    Args:
        title: plain text.
        sections: HTML, as :func:`section` makes it; empty ones are left out.
        facts: plain text over the title, a few words each.
        lead: HTML under the title.
        description: plain text for search engines and previews, or None.
    """
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    described = "" if description is None else f'<meta name="description" content="{escape(description)}">\n'
    over = " <span aria-hidden='true'>·</span> ".join(escape(fact) for fact in facts)
    body = "\n".join(part for part in sections if part)
    return f"""<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{described}<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header class="top">
<p class="eyebrow">{over}</p>
<h1>{escape(title)}</h1>
{lead}
</header>
<main>
{body}
</main>
</body>
</html>
"""


def section(title: str, body: str, name: str = "") -> str:
    """HTML as a part of a page under a plain ``title``; ``""`` without a body. ``name`` is what links call it."""
    if not body:
        return ""
    identifier = f' id="{name}"' if name else ""
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f"<section{identifier}>\n{heading}{body}\n</section>"


def paragraphs(text: str) -> str:
    """Plain text as HTML; an empty line begins a new paragraph."""
    return "".join(f"<p>{escape(' '.join(part.split()))}</p>" for part in text.split("\n\n") if part.strip())


def folded(summary: str, body: str) -> str:
    """HTML behind a line of plain text, ``summary``, that opens it; ``""`` without a body."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>" if body else ""


def fingerprint(value: object) -> str:
    """A fingerprint (``value``) in short as HTML, which shows the whole one when it is asked; ``""`` of none."""
    if not value:
        return ""
    whole = str(value)
    if short(whole) == whole:
        return f"<code>{escape(whole)}</code>"
    head = f"<summary><code>{escape(short(whole))}</code></summary>"
    return f'<details class="print">{head}<code>{escape(whole)}</code></details>'


def facts_list(rows: Iterable[tuple[str, str]]) -> str:
    """Names with what is to be said of each, as HTML; rows without anything to say are left out."""
    listing = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in rows if text)
    return f'<dl class="facts">\n{listing}\n</dl>'


def limits_list(limits: Iterable[tuple[str, str]]) -> str:
    """``limits``, what numbers do not show, of plain text: each limit in a few words, and its explanation."""
    listing = "\n".join(f"<li>{f'<b>{escape(name)}</b> ' if name else ''}{escape(text)}</li>" for name, text in limits)
    return f'<ul class="limits">\n{listing}\n</ul>'


def figure(drawn: str, title: str = "", caption: str = "", after: str = "") -> str:
    """A drawing (``drawn``, HTML) under its title and caption (plain text), with more HTML after it."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    about = f"<p>{escape(caption)}</p>" if caption else ""
    head = f"<figcaption>{heading}{about}</figcaption>\n" if title or caption else ""
    return f"<figure>{head}{drawn}\n{after}</figure>"
