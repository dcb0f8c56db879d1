"""The page in a real browser: what a person sees, by mouse, by keyboard, on a phone, in the dark, and when it fails."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import barriers, broken_words, chromium, faint, sideways, visit
from helpers import digits
from served import Served, guard, open_guard, pictures, png, predicted, serving

from nndefense.guard import Guard
from nndefense.models.class_names import readable_names
from nndefense.serving.pages import FILES, POLICY

PAGE = Path(__file__).resolve().parent.parent / "nndefense" / "serving" / "page"
KEY = "a-key-of-the-test-page"
RATE = 0.05


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def calibrated(rate: float) -> Guard:
    """A guard that abstains, and has samples to show."""
    made = open_guard()
    made.calibrate(digits("test"), specs=["digits:test"], reject_rate=rate)
    return made


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with serving(calibrated(RATE), demo_attacks=True) as served:
        yield served


@pytest.fixture
def page(browser: Any, service: Served) -> Iterator[Any]:
    with visit(browser, service.url) as found:
        found.wait_for_selector("#samples button")
        answered(found)
        yield found


def upload(page: Any, data: bytes, name: str = "digit.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def answered(page: Any) -> None:
    """Wait until the page has an answer to what it was last asked."""
    page.wait_for_selector("#details:visible")
    page.wait_for_selector("#answer:not(.busy)")


def attack(page: Any, steps: int, kind: str = "classifier") -> None:
    """Move the slider, and wait for the picture that the attack made."""
    page.check(f"input[value={kind}]")
    before = page.get_attribute("#shown", "src")
    page.locator("#eps").fill(str(steps))
    page.wait_for_function("before => document.getElementById('shown').src !== before", arg=before)
    answered(page)


def percent(text: str) -> float:
    return float(text.replace("<", "").replace(">", "").replace("%", "").replace("\u00a0", ""))


def moved_by(data: bytes, eps: float, kind: str, service: Served) -> dict[str, Any]:
    """What the attack does to a file, asked without a browser."""
    wanted = {"image": base64.b64encode(data).decode(), "attack": kind, "eps": eps}
    with service.client() as client:
        answer = client.post("/v1/demo/attack", json=wanted)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def moved(data: bytes, eps: float, kind: str, service: Served) -> dict[str, bool]:
    """Which of the two answers an attack changes."""
    found: dict[str, bool] = moved_by(data, eps, kind, service)["flipped"]
    return found


# -- the start ----------------------------------------------------------------------------------------------------


def test_the_page_begins_with_a_judged_sample_and_says_what_to_do(page: Any, service: Served) -> None:
    samples = service.client().get("/v1/samples").json()["samples"]
    assert page.get_attribute("#samples button >> nth=0", "aria-pressed") == "true"
    assert page.inner_text("#verdict").startswith("The classifier ")
    assert [page.is_visible(one) for one in ("#about", "#how", "#pair")] == [False] * 3
    assert page.is_enabled("#eps")
    assert "Choose a sample, or a picture of your own" in page.inner_text(".lead")
    assert "Move the slider to attack it" in page.inner_text(".lead")
    assert page.inner_text("#samples-hint") == "Samples; none is in the database"
    assert sorted(one["label"] for one in samples) == [str(digit) for digit in range(10)]
    rows = set(service.state.guard.database.ids(service.state.guard.database.row_numbers))
    assert not rows & {one["id"] for one in samples}


def test_a_picture_that_is_given_at_once_is_not_replaced_by_a_sample(browser: Any) -> None:
    with serving(open_guard()) as served, visit(browser, served.url) as page:
        held: list[Any] = []
        # A request of the page that was opened first would be held in the place of this one's.
        page.goto("about:blank")
        page.route("**/v1/samples", lambda route: held.append(route))
        with page.expect_request("**/v1/samples"):
            page.goto(served.url)
        page.wait_for_selector("#facts:has-text('K')")
        upload(page, pictures()[0], "mine.png")
        answered(page)
        held[0].continue_()
        page.wait_for_selector("#samples button")
        assert page.inner_text("#shown-caption") == "mine.png"
        # Without a calibration samples are rows, and the page says so.
        assert page.inner_text("#samples-hint") == "Samples from the database: each finds itself"
        assert "slider" not in page.inner_text(".lead")


def test_words_are_for_the_device(browser: Any, service: Served) -> None:
    for touch in (False, True):
        with visit(browser, service.url, 390, 800, has_touch=touch, is_mobile=touch) as page:
            page.wait_for_selector("#details:visible")
            assert ("drop" in page.inner_text(".given")) is not touch
            assert ("take a photo" in page.inner_text(".given")) is touch


# -- classes and neighbours ---------------------------------------------------------------------------------------


def test_an_upload_shows_classes_and_neighbours(page: Any, service: Served) -> None:
    upload(page, pictures()[3])
    answered(page)
    said = predicted([pictures()[3]], service.state.guard, top=10)[0].to_json()
    assert page.inner_text("#bare-class") == said["bare"]["class"]
    assert page.inner_text("#defended-class") == said["class"]
    assert page.inner_text("#verdict").startswith(f"The classifier says {said['bare']['class']}, ")
    assert page.get_attribute("#verdict", "aria-live") == "polite"

    rows = page.locator("#classes tr").all()
    assert len(rows) == 5
    shares = {one["class"]: one["probability"] for one in said["top"]}
    for row in rows:
        name = row.locator("th").inner_text()
        assert percent(row.locator("td").nth(1).inner_text()) == pytest.approx(100 * shares[name], abs=0.11)
        drawn = row.locator("td").nth(1).locator(".bar").evaluate("bar => bar.style.getPropertyValue('--p')")
        assert float(drawn.rstrip("%")) == pytest.approx(100 * shares[name])
        # The order stays while a slider moves.
    assert [row.locator("th").inner_text() for row in rows] == sorted(row.locator("th").inner_text() for row in rows)

    neighbors = page.locator("#neighbors li").all()
    assert len(neighbors) == len(said["neighbors"]) == 10
    for item, one in zip(neighbors, said["neighbors"], strict=True):
        text = item.inner_text()
        assert text.startswith(one["class"])
        assert percent(text.split("weight ")[1].splitlines()[0]) == pytest.approx(100 * one["weight"], abs=0.06)
        assert float(text.split("distance ")[1].split()[0]) == pytest.approx(one["distance"], rel=0.01)
    page.wait_for_function("() => [...document.querySelectorAll('#neighbors img')].every((i) => i.naturalWidth === 8)")

    assert f"{said['percentile']:.1f}" in page.inner_text("#distance-text")
    assert "5\u00a0% of clean pictures" in page.inner_text("#distance-text")
    assert page.is_visible("#scale")
    assert str(round(said["percentile"], 1)) in str(page.get_attribute("#scale", "aria-label"))


def test_a_sample_a_paste_and_a_drop_are_pictures_too(page: Any, service: Served) -> None:
    page.click("#samples button >> nth=2")
    answered(page)
    assert page.get_attribute("#samples button >> nth=2", "aria-pressed") == "true"
    assert page.inner_text("#shown-caption").startswith("Sample 3, labelled ")

    give = """([data, event]) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
      const Kind = event === "paste" ? ClipboardEvent : DragEvent;
      document.body.dispatchEvent(new Kind(event, options));
    }"""
    for number, (event, caption) in enumerate([("paste", "Pasted picture"), ("drop", "given.png")]):
        data = pictures()[10 + number]
        page.evaluate(give, [base64.b64encode(data).decode(), event])
        page.wait_for_function("text => document.getElementById('shown-caption').textContent === text", arg=caption)
        answered(page)
        assert page.inner_text("#defended-class") == predicted([data], service.state.guard)[0].class_name
        assert page.locator("#samples [aria-pressed=true]").count() == 0


def test_a_picture_of_another_size_says_how_it_is_read(page: Any) -> None:
    upload(page, png(np.linspace(0, 1, 30 * 20).reshape(20, 30)), "wide.png")
    answered(page)
    page.wait_for_selector(
        "#shown-caption:has-text('wide.png, 30 × 20, read as 8 × 8')".replace(" × ", "\u00a0×\u00a0")
    )
    shown = page.evaluate(
        "() => { const b = document.getElementById('shown').getBoundingClientRect(); return b.width / b.height; }"
    )
    assert shown == pytest.approx(1)


def test_many_neighbours_are_shown_when_they_are_asked_for(browser: Any) -> None:
    with serving(open_guard(k=30)) as served, visit(browser, served.url) as page:
        page.wait_for_selector("#facts:has-text('K')")
        upload(page, pictures()[0])
        answered(page)
        assert page.locator("#neighbors li").count() == 12
        page.click("#more")
        assert page.locator("#neighbors li").count() == 30
        assert not page.is_visible("#more")
        assert page.evaluate("document.activeElement === document.querySelectorAll('#neighbors li')[12]")
        # And without a calibration, nothing is said that is not known.
        assert "not calibrated" in page.inner_text("#distance-text")
        assert not page.is_visible("#scale")
        assert not page.is_visible("#attack")


def test_abstention_is_said_first(browser: Any) -> None:
    made = calibrated(0.99)
    with serving(made, demo_attacks=True) as served, visit(browser, served.url) as page:
        page.wait_for_selector("#samples button")
        far = next(data for data in pictures() if predicted([data], made)[0].abstained)
        upload(page, far)
        answered(page)
        assert "The defence abstains" in page.inner_text("#verdict")
        assert page.inner_text("#defended-class") == "Abstains"
        said = predicted([far], made)[0]
        assert page.inner_text("#defended-sure").startswith(f"would say {said.class_name}")
        assert faint(page) == []


# -- the attack ---------------------------------------------------------------------------------------------------


def test_a_target_is_chosen_and_reached(page: Any) -> None:
    said = predicted([pictures()[0]])[0].bare
    upload(page, pictures()[0])
    answered(page)
    # The class that the picture is taken for is none to reach.
    assert page.evaluate(
        "[...document.getElementById('target').options].filter((o) => o.disabled).map((o) => o.text)"
    ) == [said.class_name]
    towards = str((said.class_index + 5) % 10)
    page.select_option("#target", label=towards)
    assert "towards the class chosen" in page.inner_text("#eps-hint")
    attack(page, 50)
    assert page.inner_text("#bare-class") == towards
    assert f"towards {towards}" in page.text_content("#note")
    # The attack on the defence has none.
    page.check("input[value=defense]")
    assert page.is_disabled("#target")
    answered(page)
    assert "away from" in page.text_content("#note")


def test_the_slider_flips_the_classifier_while_the_defence_holds(page: Any, service: Served) -> None:
    data = next(
        one for one in pictures() if moved(one, 0.2, "classifier", service) == {"bare": True, "defended": False}
    )
    expected = moved_by(data, 0.2, "classifier", service)
    upload(page, data)
    answered(page)
    given = page.get_attribute("#shown", "src")
    before = page.inner_text("#bare-class"), page.inner_text("#defended-class")
    attack(page, 20)
    assert page.inner_text("#eps-text") == "0.20"
    assert page.get_attribute("#eps", "aria-valuetext") == "0.20 of the picture's length"
    assert page.inner_text("#bare-class") == expected["attacked"]["prediction"]["bare"]["class"] != before[0]
    if not expected["attacked"]["prediction"]["abstained"]:
        assert page.get_attribute("#verdict", "data-outcome") == "held"
        assert page.inner_text("#defended-class") == before[1]
        assert f"flips from {before[0]} to {page.inner_text('#bare-class')}" in page.inner_text("#verdict")
        assert "holds" in page.inner_text("#verdict")
    assert "the true class is not known here" in page.text_content("#note")
    assert page.inner_text("#difference-caption") == f"Difference × {expected['difference']['magnification']}"
    for image in ("before", "difference", "shown"):
        assert page.evaluate("id => document.getElementById(id).naturalWidth", image) == 8
    assert page.is_visible("#tick-key")

    page.locator("#eps").fill("0")
    page.wait_for_selector("#pair", state="hidden")
    assert (page.inner_text("#bare-class"), page.inner_text("#defended-class")) == before
    assert page.get_attribute("#shown", "src") == given


def test_the_adaptive_attack_makes_the_defence_fall(page: Any, service: Served) -> None:
    data = next(one for one in pictures() if moved(one, 0.3, "defense", service)["defended"])
    expected = moved_by(data, 0.3, "defense", service)["attacked"]["prediction"]
    upload(page, data)
    answered(page)
    before = page.inner_text("#defended-class")
    attack(page, 30, "defense")
    assert page.get_attribute("#verdict", "data-outcome") == ("abstained" if expected["abstained"] else "fallen")
    if not expected["abstained"]:
        assert page.inner_text("#defended-class") == expected["class"] != before
        assert "falls" in page.inner_text("#verdict")
    assert "Adaptive attack on the defence" in page.text_content("#note")

    # The other measure keeps the slider's place, and is a new attack.
    page.select_option("#norm", "linf")
    page.wait_for_function("() => document.getElementById('note').textContent.includes('46/255')")
    answered(page)
    assert page.inner_text("#eps-text") == "46/255"


def test_every_outcome_has_its_sentence(page: Any) -> None:
    def said(bare: int, defended: int, abstained: bool = False, far: bool = False, **near: list[int]) -> dict[str, Any]:
        def opinion(number: int, others: list[int]) -> dict[str, Any]:
            share = 1 / (len(others) + 1) - 0.01 * bool(others)
            shares = [[str(number), share], *([str(one), share - 0.01] for one in others), ["9", 0.01]]
            return {"class": str(number), "index": number, "probability": share, "shares": shares}

        return {
            **opinion(defended, near.get("defended_near", [])),
            "abstained": abstained,
            "percentile": 1.0 if far else 0.99,
            "agree": bare == defended,
            "bare": opinion(bare, near.get("bare_near", [])),
        }

    both = """async ([before, now]) => { const w = await import('/page/words.js');
        for (const one of [before, before?.bare, now, now.bare]) if (one) one.shares = new Map(one.shares);
        const flat = (parts) => parts.map((p) => typeof p === 'string' ? p : p[1]).join('');
        return before ? [w.outcome(before, now), flat(w.attacked(before, now))] : ['', flat(w.verdict(now))]; }"""
    for before, now, word, sentence in [
        (None, said(3, 3), "", "The classifier says 3, and the pictures nearest to it say 3 too."),
        (None, said(3, 5), "", "The classifier says 3, but the pictures nearest to it say 5."),
        (
            None,
            said(3, 3, far=True),
            "",
            "Farther from the database than every clean picture. "
            "The classifier says 3, and the pictures nearest to it say 3 too.",
        ),
        (
            said(3, 3),
            said(8, 3, True, far=True),
            "abstained",
            "Farther from the database than every clean picture. "
            "The classifier flips from 3 to 8; the defence abstains.",
        ),
        (
            None,
            said(3, 3, True),
            "",
            "The classifier says 3. The defence abstains: the picture is unlike those that it knows.",
        ),
        (
            None,
            said(3, 3, True, far=True),
            "",
            "Farther from the database than every clean picture. The classifier says 3. The defence abstains.",
        ),
        # What is no more than a tie is no headline.
        (
            None,
            said(3, 5, defended_near=[7, 1]),
            "",
            "The classifier says 3, and the pictures nearest to it are divided between 5, 7 and 1.",
        ),
        (
            None,
            said(3, 3, bare_near=[8]),
            "",
            "The classifier wavers between 3 and 8, but the pictures nearest to it say 3.",
        ),
        (
            None,
            said(3, 3, bare_near=[8, 5, 2], defended_near=[1, 2, 4, 6]),
            "",
            "The classifier wavers between 3, 8, 5 and 1\u00a0other, and the pictures nearest to it are divided "
            "between 3, 1, 2 and 2\u00a0others.",
        ),
        (
            said(3, 3),
            said(8, 5, defended_near=[3, 8]),
            "fallen",
            "The classifier flips from 3 to 8, and the defence falls, from 3 to 5. It is divided between 5, 3 and 8.",
        ),
        (said(3, 3), said(8, 3), "held", "The classifier flips from 3 to 8. The defence holds 3."),
        (said(3, 3), said(8, 8), "fallen", "The classifier flips from 3 to 8, and the defence falls with it, to 8."),
        (said(3, 3), said(8, 5), "fallen", "The classifier flips from 3 to 8, and the defence falls, from 3 to 5."),
        (said(3, 3), said(3, 5), "fallen", "The classifier keeps 3, but the defence falls, from 3 to 5."),
        (said(3, 3), said(3, 3), "still", "The classifier keeps 3, and the defence 3: nothing moves yet."),
        (said(3, 3), said(8, 3, True), "abstained", "The classifier flips from 3 to 8; the defence abstains."),
        (
            said(3, 3, True),
            said(3, 3, True),
            "abstained",
            "The classifier keeps 3; the defence abstains, as before the attack.",
        ),
        (
            said(3, 3, True),
            said(8, 3),
            "answers",
            "The classifier flips from 3 to 8. The defence no longer abstains: it says 3.",
        ),
    ]:
        assert page.evaluate(both, [before, now]) == [word, sentence]
    shares = page.evaluate(
        "async (some) => { const w = await import('/page/words.js'); return some.map(w.percent); }",
        [0, 1e-6, 0.001, 0.5, 0.9991, 1],
    )
    assert [one.replace("\u00a0", " ") for one in shares] == ["0 %", "< 0.1 %", "0.1 %", "50.0 %", "> 99.9 %", "100 %"]


def test_an_attack_can_be_stopped(page: Any, service: Served) -> None:
    upload(page, pictures()[0])
    answered(page)
    shown = page.inner_text("#verdict")
    page.route("**/v1/demo/attack", lambda route: None)
    page.locator("#eps").fill("10")
    page.wait_for_selector("#stop:visible")
    assert page.get_attribute("#answer", "aria-busy") == "true"
    assert page.inner_text("#attack-status") == "Attacking the classifier …"
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    assert page.input_value("#eps") == "0"
    assert page.evaluate("document.activeElement.id") == "eps"
    page.locator("#eps").fill("12")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    assert (page.input_value("#eps"), page.inner_text("#verdict")) == ("0", shown)
    assert page.get_attribute("#answer", "aria-busy") == "false"
    page.unroute("**/v1/demo/attack")


def test_only_the_last_place_of_the_slider_is_asked_for(page: Any) -> None:
    upload(page, pictures()[0])
    answered(page)
    asked: list[float] = []
    page.on("request", lambda one: asked.append(one.post_data_json["eps"]) if "demo/attack" in one.url else None)
    page.focus("#eps")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#pair:visible")
    answered(page)
    assert asked[-1] == pytest.approx(0.08)
    assert len(asked) <= 3


# -- by keyboard, on a phone, in the dark -------------------------------------------------------------------------


def test_everything_works_by_keyboard(page: Any) -> None:
    seen: list[str] = []
    # Listening from the start: a dialogue that opens just after would not be noticed.
    choosers: list[Any] = []
    page.on("filechooser", lambda one: choosers.append(one))

    def tab(until: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            name, outlined = page.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                return [e.id || e.value || e.getAttribute('aria-pressed') || e.href, s.outlineStyle !== 'none']; }"""
            )
            assert outlined, f"{name} does not show that it has the focus"
            seen.append(name)
            if name == until:
                return
        raise AssertionError(f"{until} was not reached: {seen}")

    page.keyboard.press("Tab")
    assert page.inner_text(":focus") == "Skip to the answer"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    tab("false")
    page.keyboard.press("Enter")
    answered(page)
    tab("choose")
    page.keyboard.press("Enter")
    for _ in range(100):
        page.wait_for_timeout(50)
        if choosers:
            break
    choosers[0].set_files({"name": "digit.png", "mimeType": "image/png", "buffer": pictures()[5]})
    page.wait_for_function("() => document.getElementById('shown-caption').textContent === 'digit.png'")
    answered(page)
    before = page.text_content("#note")
    tab("classifier")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[value=defense]")
    page.keyboard.press("ArrowLeft")
    tab("norm")
    tab("eps")
    page.keyboard.press("End")
    page.wait_for_selector("#pair:visible")
    answered(page)
    assert page.inner_text("#eps-text") == "0.50"
    assert page.text_content("#note") != before
    assert page.evaluate("document.activeElement.id") == "eps"
    page.keyboard.press("Home")
    page.wait_for_selector("#pair", state="hidden")
    # The order is that of the page: pictures, then the attack, then the answer.
    assert [one for one in dict.fromkeys(seen) if one in ("false", "choose", "classifier", "norm", "eps")] == [
        "false", "choose", "classifier", "norm", "eps"
    ]  # fmt: skip


@pytest.mark.parametrize("width", [320, 820, *(pytest.param(w, marks=pytest.mark.slow) for w in (360, 600))])
def test_nothing_sticks_out_of_a_narrow_window(browser: Any, service: Served, width: int) -> None:
    with visit(browser, service.url, width, 700, has_touch=True) as page:
        page.wait_for_selector("#samples button")
        assert sideways(page) == 0
        for change in (lambda: upload(page, pictures()[0]), lambda: attack(page, 20)):
            page.evaluate("scrollTo(0, 0)")
            change()
            answered(page)
            # The verdict comes into sight, and stays there.
            seen = "(b) => 0 <= b.top && b.bottom <= 700"
            seen = f"() => ({seen})(document.getElementById('verdict').getBoundingClientRect())"
            page.wait_for_function(seen, timeout=10_000)
            page.wait_for_timeout(200)
            assert page.evaluate(seen)
        assert sideways(page) == 0
        assert barriers(page) == []
        assert not page.is_visible("#note")
        page.click("#how summary")
        assert page.inner_text("#note").startswith("PGD on the classifier")
        # What the slider does is seen while it is moved.
        top, bottom = page.evaluate(
            "['eps', 'verdict'].map((id) => document.getElementById(id).getBoundingClientRect()).map((b) => b.bottom)"
        )
        assert abs(bottom - top) < 700
        for text in ("#bare-class", "#defended-class", "#neighbors li >> nth=2", "#scale"):
            box = page.locator(text).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        for other in (390, 768, 1280):
            page.set_viewport_size({"width": other, "height": 700})
            assert sideways(page) == 0
            assert broken_words(page) == []


NAMES = {
    "words": ["English springer spaniel", "cassette_player", "n02085936-Maltese_dog", "parachute"],
    "long": [
        "sulphur-crested cockatoo, Kakatoe galerita, Cacatua galerita",
        "electrocardiograph machine",
        "Pneumonoultramicroscopicsilicovolcanoconiosis",
    ],
    "ids": ["n01440764", "n02102040", "n02979186", "n03888257"],
}


@pytest.mark.parametrize("kind", ["words", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("long", "ids"))])
def test_names_of_classes_are_read_without_ids_and_whole(browser: Any, service: Served, kind: str) -> None:
    names = [f"{one}_{way}" for way in ("left", "right", "upper") for one in NAMES[kind]][:10]
    names = (NAMES[kind] + names)[:10]
    names += [f"other_{number}" for number in range(10 - len(names))]

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rename(one) for key, one in value.items()}
        if isinstance(value, list):
            return [rename(one) for one in value]
        return names[int(value)] if isinstance(value, str) and value.isdigit() and len(value) == 1 else value

    def answer(route: Any) -> None:
        found = route.fetch().json()
        route.fulfill(json={**found, "names": readable_names(names)} if "names" in found else rename(found))

    def broken(page: Any) -> list[str]:
        return [word for word in broken_words(page) if len(word) <= 18]

    with visit(browser, service.url, 1280, 700) as page:
        for path in ("v1/classify", "v1/model", "v1/samples", "page/settings.json", "v1/demo/attack"):
            page.route(f"**/{path}", answer)
        page.reload()
        page.wait_for_selector("#samples button")
        answered(page)
        for sample in (1, 2):
            page.click(f"#samples button >> nth={sample}")
            answered(page)
            for width in (320, 390, 768, 1280):
                page.set_viewport_size({"width": width, "height": 700})
                assert sideways(page) == 0
                assert broken(page) == []
        attack(page, 30)
        assert broken(page) == []
        told = page.inner_text("body") + page.text_content("#note") + page.text_content("#target")
        assert "_" not in told
        assert "n0" not in told
        assert any(name in page.inner_text("#verdict") for name in readable_names(names))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(browser: Any, service: Served, scheme: str) -> None:
    with visit(browser, service.url, color_scheme=scheme) as page:
        page.wait_for_selector("#samples button")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) > 382) == (scheme == "light")
        assert faint(page) == []
        upload(page, pictures()[0])
        answered(page)
        attack(page, 20)
        upload(page, b"this is no picture")
        page.wait_for_selector("#error:visible")
        assert faint(page) == []
        assert barriers(page) == []
        page.complaints.clear()


def test_the_checks_of_reading_and_reaching_can_fail(page: Any) -> None:
    page.evaluate(
        """() => { const e = document.getElementById('facts'); e.style.color = '#bbb';
        document.getElementById('choose').textContent = ''; document.querySelector('h2').outerHTML; }"""
    )
    assert any("pictures" in one for one in faint(page))
    assert {one.split(":")[0] for one in barriers(page)} == {"names", "styles"}
    page.evaluate("document.body.append(Object.assign(document.createElement('p'), {id: 'facts'}))")
    page.set_viewport_size({"width": 320, "height": 600})
    page.evaluate("document.getElementById('file').hidden = false, document.body.style.width = '400px'")
    assert sideways(page) > 0
    assert any(one.startswith("ids") for one in barriers(page))


def test_nothing_moves_where_motion_is_not_wanted(browser: Any, service: Served) -> None:
    ask = "() => getComputedStyle(document.getElementById('details')).transitionDuration"
    for motion, expected in (("reduce", {"0s"}), ("no-preference", {"0.15s"})):
        with visit(browser, service.url, reduced_motion=motion) as page:
            assert {page.evaluate(ask)} == expected


# -- when something goes wrong ------------------------------------------------------------------------------------


def test_a_bad_file_is_an_error_in_words(page: Any) -> None:
    page.click("#samples button >> nth=0")
    answered(page)
    shown = page.inner_text("#verdict"), page.get_attribute("#shown", "src")
    for data, kind, words in [
        (b"hello", "text/plain", "Give a PNG, JPEG, WebP or GIF file."),
        (b"hello", "image/png", "This is no picture that can be read here"),
        (b"", "image/png", ""),
        (pictures()[0][:60], "image/png", "damaged"),
        (pictures()[0], "image/jpeg", "not what its name says"),
    ]:
        page.evaluate("document.getElementById('error').hidden = true")
        upload(page, data, kind=kind)
        page.wait_for_selector("#error:visible")
        assert words in page.inner_text("#error")
        assert page.get_attribute("#error", "role") == "alert"
        # The last answer stays, and can still be attacked.
        assert (page.inner_text("#verdict"), page.get_attribute("#shown", "src")) == shown
        assert page.is_enabled("#eps")
    page.evaluate("document.body.dispatchEvent(new ClipboardEvent('paste', {bubbles: true}))")
    page.wait_for_selector("#error:has-text('no picture in the clipboard')")
    page.click("#samples button >> nth=1")
    page.wait_for_selector("#error", state="hidden")
    assert all("Failed to load resource" in one for one in page.complaints)
    page.complaints.clear()


def test_a_busy_service_is_asked_again_and_a_dead_one_reported(page: Any) -> None:
    answers = [503, 429]

    def busy(route: Any) -> None:
        if answers:
            route.fulfill(status=answers.pop(), headers={"retry-after": "1"}, json={"title": "busy"})
        else:
            route.continue_()

    page.route("**/v1/classify", busy)
    upload(page, pictures()[0])
    answered(page)
    assert not answers
    assert not page.is_visible("#error")
    page.unroute("**/v1/classify")

    page.route("**/v1/classify", lambda route: route.abort())
    upload(page, pictures()[1])
    page.wait_for_selector("#error:has-text('cannot be reached')")
    page.unroute("**/v1/classify")
    page.route("**/v1/demo/attack", lambda route: route.fulfill(status=500, body="<h1>proxy</h1>"))
    page.locator("#eps").fill("5")
    page.wait_for_selector("#error:has-text('status 500')")
    assert page.input_value("#eps") == "0"
    page.complaints.clear()


def test_a_service_with_keys_asks_for_one(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY + "\n")
    with serving(calibrated(RATE), api_key_file=file, demo_attacks=True) as served, visit(browser, served.url) as page:
        page.wait_for_selector("#key-form:visible")
        assert page.evaluate("document.activeElement.id") == "key"
        assert barriers(page) == []
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#error:has-text('not accepted')")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#samples button")
        assert not page.is_visible("#key-form")
        upload(page, pictures()[0])
        answered(page)
        attack(page, 10)
        page.wait_for_function(
            "() => [...document.querySelectorAll('#neighbors img')].every((i) => i.naturalWidth === 8)"
        )
        assert page.get_attribute("#neighbors img", "src").startswith("blob:")
        assert KEY not in page.content()
        assert all("401" in one for one in page.complaints)
        page.complaints.clear()


# -- the files ----------------------------------------------------------------------------------------------------


def test_the_policy_lets_nothing_in_and_the_files_need_nothing() -> None:
    with serving(guard()) as served, served.client() as client:
        front = client.get("/")
        assert front.headers["content-security-policy"] == POLICY
        assert "'unsafe" not in POLICY
        assert POLICY.startswith("default-src 'none'")
        assert front.headers["x-content-type-options"] == "nosniff"
        for name, kind in FILES.items():
            answer = client.get(f"/page/{name}")
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
            assert answer.content == (PAGE / name).read_bytes()
            assert "charset" not in kind or answer.text.isprintable() or "\n" in answer.text
            again = client.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            links = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in links
            assert "https://" not in links
            assert "innerHTML" not in links
        for path in ("/page/", "/page/none.js", "/page/..%2fguard.py", "/page/../guard.py"):
            assert client.get(path).status_code == 404
        assert client.get("/page/settings.json").json() == {"demo_attacks": None, "names": list("0123456789")}
        assert client.post("/v1/demo/attack", json={}).status_code in (404, 405)
        assert "/page/{name}" not in json.dumps(client.get("/openapi.json").json()["paths"])
    assert {path.name for path in PAGE.iterdir()} == set(FILES)


def test_a_script_or_style_that_got_into_the_page_does_nothing(page: Any) -> None:
    for code in (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=1>')",
        "document.body.setAttribute('onclick', 'window.ran = 1')",
        "Object.assign(document.createElement('script'), {text: 'window.ran = 1'})",
    ):
        with pytest.raises(Exception, match="requires 'Trusted"):
            page.evaluate(f"() => {{ {code} }}")
    page.complaints.clear()
    page.evaluate("() => document.body.setAttribute('style', 'background: red')")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != "rgb(255, 0, 0)"
    with pytest.raises(Exception, match="fetch"):
        page.evaluate("() => fetch('http://127.0.0.1:1/')")
    assert all("Content Security Policy" in one or "CSP" in one for one in page.complaints)
    assert len(page.complaints) >= 2
    page.complaints.clear()
