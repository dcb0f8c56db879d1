"""The frame of every report: one HTML document with its style inside, which runs no script and opens no connection."""

from __future__ import annotations

from importlib import resources

from nndefense.evaluation.report.wording import escape


def document(title: str, body: str, description: str | None = None) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML that is already escaped where it must be.
        description: plain text for search engines and previews, or None.
    """
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    described = "" if description is None else f'<meta name="description" content="{escape(description)}">\n'
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
{body}
</body>
</html>
"""
