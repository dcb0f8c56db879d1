"""Takes the pictures of docs/page.md: ``python tests/serving_screenshots.py --database runs/demo/database``.

The service runs in this process, with a database of digits, as ``make demo`` or docs/slides.md make one; the pictures
show its own answers.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from browsing import chromium, visit
from PIL import Image
from served import serving

from nndefense.datasets import open_dataset
from nndefense.guard import Guard

WIDE, PHONE = (1120, 960), (360, 780)
COLOURS = 160


def shoot(page: Any, path: Path, *, whole: bool = False) -> None:
    """Keep what the window shows (or the whole page) as a PNG with few colours, enough for a page of text."""
    page.wait_for_timeout(100)
    page.wait_for_function("() => [...document.images].every((i) => i.hidden || !i.src || i.complete)")
    image = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}  {image.width} x {image.height}  {path.stat().st_size:,} bytes  {page.inner_text('#verdict')}")


def choose(page: Any, sample: int) -> None:
    """Take one of the samples."""
    page.wait_for_selector("#samples button")
    page.click(f"#samples button >> nth={sample}")
    page.wait_for_selector("#details:visible")
    page.mouse.move(0, 0)


def attack(page: Any, steps: int, kind: str) -> str:
    """Move the slider, wait, and say what came of it."""
    page.check(f"input[value={kind}]")
    page.locator("#eps").fill(str(steps))
    page.wait_for_selector("#pair:visible")
    page.wait_for_timeout(400)
    page.wait_for_selector("#answer:not(.busy)")
    found: str = page.get_attribute("#verdict", "data-outcome")
    return found


def find(page: Any, kind: str, wanted: str) -> None:
    """The first sample and the smallest of some attacks that end as wanted."""
    for steps in (20, 25, 15, 30):
        for sample in range(page.locator("#samples button").count()):
            choose(page, sample)
            if attack(page, steps, kind) == wanted:
                return
    raise SystemExit(f"no sample ends {wanted} under the attack on the {kind}: choose another database")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, default=Path("runs/demo/database"))
    parser.add_argument(
        "--calibration", default="digits:test", help="clean images, where the database has no guard.json"
    )
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    chosen = parser.parse_args()
    guard = Guard.open(chosen.database, device="cpu")
    if guard.reject_rate is None:
        guard.calibrate(open_dataset(chosen.calibration), specs=[chosen.calibration], reject_rate=chosen.rate)
    with chromium() as browser, serving(guard, demo_attacks=True) as served:
        with visit(browser, served.url, *WIDE) as page:
            page.wait_for_selector("#samples button")
            find(page, "classifier", "held")
            shoot(page, chosen.out / "serving-held.png", whole=True)
            find(page, "defense", "fallen")
            page.evaluate("() => scrollTo(0, 0)")  # the slider lies below the verdict
            shoot(page, chosen.out / "serving-fallen.png")
            page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
            page.wait_for_selector("#error:visible")
            shoot(page, chosen.out / "serving-error.png")
            page.complaints.clear()
        with visit(browser, served.url, *WIDE, color_scheme="dark") as page:
            page.wait_for_selector("#samples button")
            noise = io.BytesIO()
            Image.effect_noise((64, 64), 120).save(noise, "PNG")
            page.set_input_files("#file", {"name": "noise.png", "mimeType": "image/png", "buffer": noise.getvalue()})
            page.wait_for_selector("#verdict:has-text('abstains')")
            shoot(page, chosen.out / "serving-abstained-dark.png")
        with visit(browser, served.url, *PHONE, has_touch=True, device_scale_factor=1) as page:
            page.wait_for_selector("#samples button")
            find(page, "classifier", "held")
            page.evaluate("() => document.getElementById('attack-title').scrollIntoView()")
            shoot(page, chosen.out / "serving-phone.png")


if __name__ == "__main__":
    main()
