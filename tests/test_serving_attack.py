"""Attacks for the page: what the answer says is true of the pictures in it, and nobody can keep the server busy."""

from __future__ import annotations

import base64
import gc
import io
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from helpers import digits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served import Served, guard, open_guard, pictures, png, predicted, serving, until

from nndefense.attacks import distance, radius
from nndefense.guard import Guard
from nndefense.serving.demo_attacks import attack as attacks
from nndefense.serving.demo_attacks import routes
from nndefense.serving.demo_attacks.attack import (
    AttackJob,
    AttackTarget,
    AttackWatch,
    Late,
    Stopped,
    attack_picture,
    eight_bits,
    magnified,
    picture_within,
    png_text,
)
from nndefense.serving.http.bodies import read_json


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with serving(guard(), demo_attacks=True) as served:
        yield served


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(service: Served, data: bytes, **wanted: Any) -> Any:
    with service.client() as client:
        return client.post("/v1/demo/attack", json={"image": text(data), **wanted})


def pixels(found: dict[str, Any]) -> torch.Tensor:
    """A picture of an answer as C x H x W in [0, 1]."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["image"]))), dtype=np.float32)
    return torch.from_numpy(image / np.float32(255)).reshape(1, 8, 8)


# -- what the answer says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["classifier", "defense"])
@pytest.mark.parametrize(
    ("norm", "eps"),
    [("normalized-l2", 0.2), ("linf", 40 / 255), pytest.param("linf", 0.1, marks=pytest.mark.slow), ("linf", 0.0)],
)
def test_the_answer_is_true_of_its_pictures(service: Served, attack: str, norm: str, eps: float) -> None:
    answer = ask(service, pictures()[0], attack=attack, norm=norm, eps=eps)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    clean, attacked = pixels(found["clean"]), pixels(found["attacked"])
    # The clean picture is the one that was sent, and both predictions are those of /v1/classify.
    assert torch.equal(clean, pixels({"image": text(pictures()[0])}))
    files = [base64.b64decode(found[key]["image"]) for key in ("clean", "attacked")]
    with service.client() as client:
        said = client.post("/v1/classify", json={"images": [text(file) for file in files]}).json()["predictions"]
    assert said == [found["clean"]["prediction"], found["attacked"]["prediction"]]
    before, after = said
    assert found["flipped"]["bare"] == (before["bare"]["class"] != after["bare"]["class"])
    assert found["flipped"]["defended"] == (before["class"] != after["class"])
    assert found["away_from"] == (before["bare"] if attack == "classifier" else before)["class"]
    # It is within its budget after rounding, and its size is as stated.
    size = float(distance(clean[None], attacked[None], norm))
    assert size <= float(radius(clean[None], eps, norm)) + 1e-5
    assert found["size"]["linf"] == pytest.approx(float((attacked - clean).abs().max()), abs=1e-6)
    assert found["size"]["l2"] == pytest.approx(float((attacked - clean).norm()), rel=1e-4)
    assert found["size"]["normalized-l2"] == pytest.approx(found["size"]["l2"] / float(clean.norm()), rel=1e-4)
    assert (size > 0) == (eps > 0)
    shown = pixels(found["difference"])
    factor = found["difference"]["magnification"]
    assert torch.allclose(shown, 0.5 + factor * (attacked - clean), atol=0.5 / 255 + 1e-6)
    # The same request has the same answer.
    again = ask(service, pictures()[0], attack=attack, norm=norm, eps=eps).json()
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize(
    ("count", "least_bare", "least_adaptive"), [(6, 4, 3), pytest.param(12, 9, 6, marks=pytest.mark.slow)]
)
def test_attacks_do_their_work_and_the_adaptive_one_is_the_stronger(
    service: Served, count: int, least_bare: int, least_adaptive: int
) -> None:
    bare = defended = adaptive = 0
    for data in pictures()[:count]:
        plain = ask(service, data, attack="classifier", eps=0.3).json()["flipped"]
        bare, defended = bare + plain["bare"], defended + plain["defended"]
        adaptive += ask(service, data, attack="defense", eps=0.3).json()["flipped"]["defended"]
    assert bare >= least_bare
    assert adaptive >= max(defended, least_adaptive)


def test_each_attack_leaves_the_class_of_what_it_attacks(service: Served) -> None:
    for data in pictures():
        found = ask(service, data, attack="classifier", eps=0.25).json()
        if found["flipped"] == {"bare": True, "defended": False}:
            break
    # Of this picture the two answers differ.
    torn = base64.b64decode(found["attacked"]["image"])
    said = found["attacked"]["prediction"]
    assert said["bare"]["class"] != said["class"]
    assert ask(service, torn, attack="classifier").json()["away_from"] == said["bare"]["class"]
    assert ask(service, torn, attack="defense").json()["away_from"] == said["class"]


def test_an_attack_on_the_classifier_reaches_the_class_that_is_chosen(service: Served) -> None:
    said = predicted([pictures()[0]])[0].bare
    last = int(np.argmin(said.probabilities))
    other = str((said.class_index + 5) % 10)
    for target, towards in ((other, other), ("least-likely", str(last))):
        found = ask(service, pictures()[0], eps=0.5, target=target).json()
        assert (found["towards"], found["away_from"]) == (towards, said.class_name)
        assert found["attacked"]["prediction"]["bare"]["class"] == towards
    assert ask(service, pictures()[0], eps=0.1).json()["towards"] is None


def test_a_target_that_cannot_be_one_is_refused(service: Served) -> None:
    own = predicted([pictures()[0]])[0].bare.class_name
    for wanted, words in (
        ({"target": own}, f"the picture is taken for {own} already"),
        ({"target": "eleven"}, "'eleven' is not one of the classifier's 10 classes"),
        ({"target": "3", "attack": "defense"}, "cannot be sent towards a class"),
        ({"target": 3}, "target: Input should be a valid string"),
    ):
        answer = ask(service, pictures()[0], **wanted)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_argument")
        assert words in answer.json()["detail"]


def test_the_defence_is_shown_pictures_as_people_are(monkeypatch: pytest.MonkeyPatch) -> None:
    target, shown = AttackTarget(guard()), []
    whole = target.surface

    def predict(images: torch.Tensor) -> torch.Tensor:
        shown.append(images)
        return whole.predict(images)

    target._surface = replace(whole, predict=predict)
    clean = eight_bits(digits("test").batch([0])[0])
    label = int(whole.predict(clean).argmax())
    made = attack_picture(target, AttackJob(clean, label, False, "defense", "normalized-l2", 0.3, 20), AttackWatch(60))
    assert len(shown) >= 3
    radii = radius(clean, 0.3, "normalized-l2")
    for images in shown:
        assert torch.equal(images, eight_bits(images))
        assert bool((distance(clean, images, "l2") <= radii * (1 + 1e-5)).all())
    assert any(torch.equal(made[0], image) for images in shown for image in images)


def test_top_and_neighbours_are_as_asked(service: Served) -> None:
    found = ask(service, pictures()[0], top=3, neighbors=2).json()
    for key in ("clean", "attacked"):
        assert len(found[key]["prediction"]["top"]) == 3
        assert len(found[key]["prediction"]["neighbors"]) == 2


def test_what_serves_is_not_touched(service: Served) -> None:
    served = service.state.guard
    before = {name: value.clone() for name, value in served.classifier.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in served.classifier.modules()]
    target = AttackTarget(served)
    assert target.surface is target.surface
    assert target.classifier is not served.classifier
    assert not any(module.training for module in served.classifier.modules())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in served.classifier.modules()]
    assert all(torch.equal(value, before[name]) for name, value in served.classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in served.classifier.parameters())


def test_a_black_picture_can_be_attacked(service: Served) -> None:
    for attack in ("classifier", "defense"):
        found = ask(service, png(np.zeros((8, 8))), attack=attack, eps=0.5)
        assert found.status_code == 200
        # Its length is 0, and so is every share of it.
        assert found.json()["size"] == {"linf": 0, "l2": 0, "normalized-l2": 0}
        assert ask(service, png(np.zeros((8, 8))), attack=attack, eps=0.1, norm="linf").json()["size"]["linf"] > 0.09


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        ({"eps": 0.51}, 422, "invalid_argument"),
        ({"eps": 77 / 255, "norm": "linf"}, 422, "invalid_argument"),
        ({"eps": -0.1}, 422, "invalid_argument"),
        ({"eps": "much"}, 422, "invalid_argument"),
        ({"steps": 0}, 422, "invalid_argument"),
        ({"steps": 51}, 422, "invalid_argument"),
        ({"steps": 2.5}, 422, "invalid_argument"),
        ({"norm": "l2"}, 422, "invalid_argument"),
        ({"attack": "all"}, 422, "invalid_argument"),
        ({"path": "/etc/passwd"}, 422, "invalid_argument"),
        ({"image": "not base64!"}, 400, "invalid_base64"),
        ({"image": "ü"}, 400, "invalid_base64"),
        ({"image": text(b"no picture")}, 415, "unsupported_image"),
        ({"image": text(b"")}, 422, "empty_image"),
        ({"image": None}, 422, "invalid_argument"),
    ],
)
def test_a_request_out_of_bounds_is_refused(service: Served, wanted: dict[str, Any], status: int, code: str) -> None:
    answer = ask(service, pictures()[0], **wanted)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


SYNTAX = [case for case in hostile.REQUESTS if case.code == "malformed_json" and case.for_parser]


@pytest.mark.parametrize("case", SYNTAX, ids=lambda case: case.name)
def test_bodies_are_refused_as_those_of_classify_are(service: Served, case: hostile.Request) -> None:
    begun = time.monotonic()
    with service.client() as client:
        answer = client.post(
            "/v1/demo/attack", content=case.data, headers={"content-type": case.content_type, **case.headers}
        )
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_json")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "kind", ["text/plain", "image/png", "multipart/form-data; boundary=x", "application/jsonx", None]
)
def test_only_json_is_taken(service: Served, kind: str | None) -> None:
    with service.client() as client:
        headers = {} if kind is None else {"content-type": kind}
        answer = client.post("/v1/demo/attack", content=b'{"image": ""}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_a_body_of_the_largest_size_stops_nobody(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its parts nor its one image become large before they are refused, and the event loop reads none of it."""
    readers: list[str] = []

    def read(*given: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read_json(*given)

    monkeypatch.setattr(routes, "read_json", read)
    most = service.state.settings.limits.max_body_bytes
    pieces = [b'{"image": [%s]}', b'{"image": "%s"}', b'{"image": {%s}}']
    fills = [b"[],", b"AAAA", b'"a":{},']
    for (shell, fill), code in zip(
        zip(pieces, fills, strict=True), ("malformed_json", "image_too_large", "too_many_images"), strict=True
    ):
        body = shell % (fill * ((most - 100) // len(fill)))
        begun = time.monotonic()
        with service.client() as client:
            answer = client.post("/v1/demo/attack", content=body, headers={"content-type": "application/json"})
        assert answer.json()["code"] == code
        assert time.monotonic() - begun < 5
    assert readers
    assert all(name.startswith("nndefense-work") for name in readers)
    with service.client() as client:
        too_long = client.post("/v1/demo/attack", content=bytes(most + 1), headers={"content-type": "application/json"})
    assert (too_long.status_code, too_long.json()["code"]) == (413, "body_too_large")


def test_infinity_is_refused(service: Served) -> None:
    with service.client() as client:
        for number in ("NaN", "Infinity", "1e999"):
            body = f'{{"image": "{text(pictures()[0])}", "eps": {number}}}'
            answer = client.post("/v1/demo/attack", content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 422), answer.text


def test_large_pictures_and_databases_are_not_attacked(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_ROW_BYTES", 10_000)
    with service.client() as client:
        offered = client.get("/page/settings.json").json()["demo_attacks"]
    assert offered["attacks"] == ["classifier"]
    assert "too large" in offered["reason"]
    assert ask(service, pictures()[0], attack="defense").status_code == 422
    assert ask(service, pictures()[0], attack="classifier").status_code == 200
    monkeypatch.setattr(routes, "MOST_VALUES", 63)
    assert routes.offer(guard())["attacks"] == []
    assert ask(service, pictures()[0], attack="classifier").status_code == 422


def test_without_the_option_there_is_no_attack() -> None:
    with serving(guard()) as plain:
        assert ask(plain, pictures()[0]).status_code == 404
        with plain.client() as client:
            assert "/v1/demo/attack" not in client.get("/openapi.json").json()["paths"]


# -- one at a time, and ended early -------------------------------------------------------------------------------


class Held:
    """Attacks that wait at every step until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running = self.most = self.ended = 0
        self.go = threading.Event()
        monkeypatch.setattr(routes, "attack_picture", self.attack)

    def attack(self, target: AttackTarget, job: AttackJob, watch: AttackWatch) -> torch.Tensor:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.go.is_set():
                watch.look()
                time.sleep(0.01)
            return job.clean
        finally:
            self.running -= 1
            self.ended += 1


def post(port: int, data: bytes) -> socket.socket:
    """Send a request on a connection of its own, and do not wait for the answer."""
    body = f'{{"image": "{text(data)}"}}'.encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = ["POST /v1/demo/attack HTTP/1.1", "host: localhost", "content-type: application/json"]
    connection.sendall("\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body)
    return connection


def test_one_attack_runs_at_a_time_and_a_short_line_waits(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    connections = [post(service.port, pictures()[0]) for _ in range(9)]
    try:
        until(lambda: held.running == 1)
        # Predictions go on meanwhile.
        with service.client() as client:
            assert client.post("/v1/classify", files={"files": pictures()[1]}).status_code == 200
        held.go.set()
        answers = [connection.recv(65536).split(b"\r\n\r\n")[0].lower() for connection in connections]
    finally:
        held.go.set()
        for connection in connections:
            connection.close()
    statuses = sorted(answer[9:12] for answer in answers)
    assert set(statuses) == {b"200", b"503"}
    assert 1 <= statuses.count(b"503") <= 5
    assert all(b"retry-after: " in answer for answer in answers if answer[9:12] == b"503")
    assert held.most == 1


def test_an_attack_ends_when_its_client_goes(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    first, second = post(service.port, pictures()[0]), post(service.port, pictures()[0])
    until(lambda: held.running == 1)
    first.close()
    second.close()
    until(lambda: held.running == 0)
    # The one that was still waiting never begins.
    time.sleep(0.3)
    assert held.ended == 1
    held.go.set()
    assert ask(service, pictures()[0]).status_code == 200


def test_a_long_attack_is_ended(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SECONDS", 0.2)
    held = Held(monkeypatch)
    answer = ask(service, pictures()[0])
    assert (answer.status_code, answer.json()["code"]) == (503, "timed_out")
    assert "fewer steps" in answer.json()["detail"]
    # It would be too long the next time as well.
    assert "retry-after" not in answer.headers
    assert held.running == 0


@pytest.mark.parametrize("attack", ["classifier", "defense"])
def test_the_watch_is_looked_at_in_every_step(attack: Any) -> None:
    clean = eight_bits(digits("test").batch([0])[0])
    job = AttackJob(clean, 3, False, attack, "normalized-l2", 0.05, 10)
    target, watch = AttackTarget(guard()), AttackWatch(60)
    looks = 0
    look = AttackWatch.look

    def counted(self: AttackWatch) -> None:
        nonlocal looks
        looks += 1
        if looks == 7:
            self.stop()
        look(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackWatch, "look", counted)
        with pytest.raises(Stopped):
            attack_picture(target, job, watch)
    assert looks == 7
    late = AttackWatch(0)
    late.look()
    time.sleep(0.01)
    with pytest.raises(Late):
        attack_picture(target, job, late)


def test_a_surface_lives_as_long_as_its_guard(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[AttackTarget]] = []

    class Counted(AttackTarget):
        def __init__(self, guard: Guard) -> None:
            super().__init__(guard)
            made.append(weakref.ref(self))

    monkeypatch.setattr(routes, "AttackTarget", Counted)
    guards = [open_guard(), open_guard(k=3)]
    with serving(lambda: guards.pop(0), demo_attacks=True) as served:
        for _ in range(2):
            assert ask(served, pictures()[0]).status_code == 200
        assert len(made) == 1
        with served.client() as client:
            assert client.post("/v1/admin/reload").status_code == 200
        gc.collect()
        assert made[0]() is None
        assert ask(served, pictures()[0]).status_code == 200
        assert len(made) == 2


# -- pictures -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["linf", "l2", "normalized-l2"]),
    st.floats(0, 0.4),
    st.sampled_from([(1, 3, 4), (3, 5, 5)]),
)
def test_rounded_pictures_stay_in_their_budget(seed: int, norm: str, eps: float, shape: tuple[int, int, int]) -> None:
    chance = torch.Generator().manual_seed(seed)
    clean = eight_bits(torch.rand(3, *shape, generator=chance))
    radii = radius(clean, eps, norm)
    push = torch.randn(3, *shape, generator=chance)
    push = push.sign() * eps if norm == "linf" else push * (radii / push.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    found = picture_within((clean + push).clamp(0, 1), clean, radii, norm)
    assert torch.equal(found, eight_bits(found))
    assert found.min() >= 0
    assert found.max() <= 1
    assert bool((distance(clean, found, norm) <= radii * (1 + 2e-6) + 2e-6).all())
    # And they are as near to what was found as rounding allows: most of a budget of many levels is used.
    if norm == "linf" and eps > 0.1:
        assert bool((distance(clean, found, norm) >= radii - 2 / 255).all())


def test_rounding_gives_little_of_the_budget_away() -> None:
    chance = torch.Generator().manual_seed(1)
    clean = eight_bits(0.3 + 0.4 * torch.rand(20, 3, 8, 8, generator=chance))
    for size in (0.2, 0.5, 1.0):
        radii = torch.full((20,), size)
        push = torch.randn(20, 3, 8, 8, generator=chance)
        push *= (radii / push.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        found = distance(clean, picture_within(clean + push, clean, radii, "l2"), "l2")
        assert bool((found >= 0.95 * radii).all())


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.0, 100), (1 / 255, 100), (0.006, 50), (0.1, 5), (0.24, 2), (0.3, 1), (1.0, 1)]
)
def test_a_difference_is_magnified_as_far_as_it_can_be(largest: float, factor: int) -> None:
    difference = torch.zeros(1, 2, 2)
    difference[0, 0, 0], difference[0, 1, 1] = largest, -largest
    shown, times = magnified(difference)
    assert times == factor
    assert shown[0, 0, 1] == 0.5
    assert shown[0, 0, 0] == pytest.approx(min(0.5 + factor * largest, 1))
    if largest <= 0.5:
        assert torch.allclose((shown - 0.5) / times, difference, atol=1e-6)


def test_png_holds_the_pixels() -> None:
    for channels in (1, 3):
        image = eight_bits(torch.rand(channels, 4, 6, generator=torch.Generator().manual_seed(0)))
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(png_text(image)))))
        assert np.array_equal(found.reshape(4, 6, channels), (image * 255).round().permute(1, 2, 0).numpy())
    assert attacks.attack_picture is attack_picture
