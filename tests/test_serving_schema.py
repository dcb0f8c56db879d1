"""The service held against its own OpenAPI description: whatever schemathesis makes of it, the server does not fail."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import hostile_files as make
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import Served, guard, serving

from nndefense.serving.app import create_app
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.pictures.limits import MEDIA_TYPES

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
EXAMPLES = 25
# Noise is refused when it is decoded: so that something comes after that, many of the bytes are real images.
IMAGES = st.sampled_from([make.plain(), make.jpeg_with(), make.gif_with()]) | st.binary(max_size=64)
for name in MEDIA_TYPES:
    schemathesis.openapi.media_type(name, IMAGES)
schemathesis.openapi.format("binary", IMAGES)
schemathesis.openapi.format("byte", IMAGES.map(lambda data: base64.b64encode(data).decode()))


def _not_opened() -> Any:
    raise AssertionError("the description needs no database")


DESCRIPTION = create_app(_not_opened, ServingSettings(demo_attacks=True)).openapi()
OPERATIONS = {
    found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server with all there is, attacks included."""
    with serving(guard(), demo_attacks=True) as found:
        yield found


def test_the_description_is_the_servers(served: Served) -> None:
    with served.client() as client:
        assert client.get("/openapi.json").json() == DESCRIPTION
    assert {"POST /v1/classify", "POST /v1/demo/attack", "POST /v1/admin/reload", "GET /readyz"} <= OPERATIONS.keys()


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("label", OPERATIONS)
def test_nothing_fails_in_the_server(served: Served, label: str, mode: Any) -> None:
    """Requests as described, and requests that break the description."""
    seen: set[int] = set()

    @given(OPERATIONS[label].as_strategy(mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        answer = case.call(base_url=served.url, timeout=20)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    try:
        ask()
    except Exception as error:
        # Some operations have nothing in them that could break the description.
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest", "Skipped"):
            raise
    assert all(status < 500 for status in seen)
    if label == "POST /v1/classify" and mode.is_positive:
        assert {200, 422} <= seen


def test_examples_of_the_description_work(served: Served) -> None:
    """What the description shows as a request gets an answer of the shape that it shows."""
    schemas = DESCRIPTION["components"]["schemas"]
    example = schemas["ClassifyJson"]["example"]
    shown = schemas["ClassifyAnswer"]["example"]["predictions"][0]
    with served.client() as client:
        answer = client.post("/v1/classify", json=example)
    assert answer.status_code == 200
    (found,) = answer.json()["predictions"]
    assert found.keys() == shown.keys()
    assert len(found["neighbors"]) == example["neighbors"]
    assert found["neighbors"][0].keys() == shown["neighbors"][0].keys()
