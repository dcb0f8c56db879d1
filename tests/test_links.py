"""Every link from one page of the repository to another leads somewhere in a clean checkout."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of Markdown: small letters, hyphens for spaces."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.fixture(scope="module")
def tracked() -> set[Path] | None:
    """The files that a checkout has; None where there is no git."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {ROOT / name for name in done.stdout.split("\0") if name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path, tracked: set[Path] | None) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        # A file that git ignores is here, but not in anybody's checkout.
        assert tracked is None or target.is_dir() or target in tracked, f"{link} is in no checkout"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{link}: no such heading"
