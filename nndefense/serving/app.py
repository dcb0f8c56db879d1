"""The HTTP application: routes around a :class:`~nndefense.serving.http.state.ServingState`."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

try:
    from fastapi import FastAPI, Path, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
except ImportError as error:  # pragma: no cover
    from nndefense.errors import InputError

    raise InputError(
        "the service needs packages that are not installed: pip install fastapi prometheus-client uvicorn"
    ) from error

from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from torch import Tensor

from nndefense import __version__
from nndefense.errors import InputError
from nndefense.files import escaped_json
from nndefense.guard import Defended, Guard
from nndefense.serving import demo_attacks, pages
from nndefense.serving.demo_attacks.attack import png
from nndefense.serving.http.bodies import parse
from nndefense.serving.http.envelope import Envelope
from nndefense.serving.http.problem import ServiceProblem, busy, explain, of_status
from nndefense.serving.http.schema import (
    MOST,
    NUMBERS,
    ClassifyAnswer,
    HealthAnswer,
    ReloadAnswer,
    SamplesAnswer,
    describe,
    problems,
    whole_number,
)
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import ServingState
from nndefense.serving.pictures.apart import decode_images
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits, refused

SAMPLES = 10
TOP = 5
# Of the 50 that a defence may have, most clients look at none; all of them make an answer of 17 KB.
NEIGHBORS = 10
_BINARY = {"type": "string", "format": "binary"}


def create_app(guard: Guard | Callable[[], Guard], settings: ServingSettings | None = None) -> FastAPI:
    """Make the application.

    Args:
        guard: the guard, or a function that opens one: it is called in a thread when the application starts, and again
            at every reload.
        settings: see :class:`~nndefense.serving.http.settings.ServingSettings`.

    Returns:
        The application; its ``state.serving`` is the :class:`~nndefense.serving.http.state.ServingState`.

    Raises:
        InputError: the keys or the log folder cannot be used, or FastAPI is not installed.
    """
    settings = settings or ServingSettings()
    state = ServingState(guard, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await state.start()
        try:
            yield
        finally:
            await state.stop()

    app = FastAPI(
        title="nndefense",
        version=__version__,
        lifespan=lifespan,
        # Their pages load scripts from other sites; the service works without any.
        docs_url=None,
        redoc_url=None,
    )
    app.state.serving = state
    _add_probes(app, state)
    _add_classify(app, state)
    _add_pictures(app, state)
    app.include_router(pages.router(state))
    if settings.demo_attacks:
        app.include_router(demo_attacks.router(state))
    _add_errors(app)
    describe(app, settings)
    app.add_middleware(
        Envelope,
        settings=settings,
        gate=state.gate,
        metrics=state.metrics,
        journal=state.journal,
        waiting=lambda: state.batcher.waiting,
    )
    return app


def answer_json(predictions: Sequence[Defended], model: str, database: str) -> bytes:
    """The answer to a classification: exactly the JSON of the predictions that the Python call gives."""
    value = {"predictions": [one.to_json() for one in predictions], "model": model, "database": database}
    return escaped_json(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))).encode()


def _read(
    body: bytes, content_type: str | None, limits: Limits, shape: tuple[int, int, int]
) -> tuple[list[Tensor], int | None, int | None]:
    """Take a body apart and decode its images; in a worker thread."""
    upload = parse(body, content_type, limits)
    images = decode_images([(part.data, part.media_type) for part in upload.images], limits, shape)
    return images, upload.top, upload.neighbors


def _json(value: Any) -> Response:
    return Response(escaped_json(json.dumps(value, ensure_ascii=False)).encode(), media_type="application/json")


def _says(summary: str, answer: dict[str, Any], *statuses: int) -> dict[str, Any]:
    """What a route is described by, where the framework does not see its answers."""
    return {"summary": summary, "response_class": Response, "responses": {200: answer, **problems(*statuses)}}


def _add_classify(app: FastAPI, state: ServingState) -> None:
    limits, parts = state.settings.limits, state.metrics.part
    numbers = {name: {"type": "integer", "minimum": least, "maximum": MOST} for name, (least, _) in NUMBERS.items()}
    files = {"type": "array", "minItems": 1, "maxItems": limits.max_images, "items": _BINARY}
    form = {"type": "object", "required": ["files"], "properties": {"files": files, **numbers}}

    @app.post(
        "/v1/classify",
        **_says(
            "Classify one or many images",
            {"model": ClassifyAnswer, "description": "A prediction for each image, in their order."},
            *(400, 408, 413, 415, 422, 503),
        ),
        openapi_extra={
            "parameters": [
                {"name": name, "in": "query", "description": text, "schema": numbers[name]}
                for name, (_, text) in NUMBERS.items()
            ],
            "requestBody": {
                "required": True,
                "description": "Images as multipart files named ``files``, one image as it is, or base64 in JSON.",
                "content": {
                    "multipart/form-data": {"schema": form},
                    "application/json": {"schema": {"$ref": "#/components/schemas/ClassifyJson"}},
                    **{name: {"schema": _BINARY} for name in MEDIA_TYPES},
                },
            },
        },
    )
    async def classify(request: Request) -> Response:
        if unknown := [name for name in request.query_params if name not in NUMBERS]:
            raise refused("invalid_argument", f"the query may hold {' and '.join(NUMBERS)}, not {unknown[0][:80]!r}")
        # Read here and not by the framework, which would take as long for these two as for all else.
        top, neighbors = _number(request, "top"), _number(request, "neighbors")
        # The whole request is served by one guard, also where it is replaced meanwhile.
        guard = state.guard
        # Refused before anything is done for it, where it would be refused afterwards.
        state.batcher.check_room(1, state.settings.timeout)
        body, kind = await request.body(), request.headers.get("content-type")
        begun = time.perf_counter()
        images, own_top, own_neighbors = await state.small.run(_read, body, kind, limits, guard.classifier.input_shape)
        del body
        parts["decode"].observe(time.perf_counter() - begun)
        if top is None:
            top = TOP if own_top is None else own_top
        if neighbors is None:
            neighbors = NEIGHBORS if own_neighbors is None else own_neighbors
        found = await state.submit(images, top, neighbors, guard=guard)
        begun = time.perf_counter()
        answer = answer_json(found, guard.fingerprint, guard.database.fingerprint)
        parts["encode"].observe(time.perf_counter() - begun)
        return Response(answer, media_type="application/json")


def _number(request: Request, name: str) -> int | None:
    """A whole number of the query, or None where it does not stand there."""
    found = request.query_params.getlist(name)
    if not found:
        return None
    number = whole_number(name, found[0]) if len(found) == 1 else None
    if number is None:
        least = NUMBERS[name][0]
        raise refused("invalid_argument", f"{name} must stand there once, as a whole number from {least} to {MOST}")
    return number


def _add_pictures(app: FastAPI, state: ServingState) -> None:
    @app.get(
        "/v1/neighbors/{id:path}/image",
        **_says(
            "The picture of a row of the database",
            {"content": {"image/png": {"schema": _BINARY}}},
            *(404, 422, 503),
        ),
    )
    async def neighbor_image(
        id: Annotated[str, Path(max_length=4096, description="The id of a neighbour.")],
    ) -> Response:
        guard = state.guard

        def picture() -> bytes | None:
            try:
                pixels = guard.neighbor_image(id)
            except InputError:
                return None
            return None if pixels is None else png(pixels)

        found = await state.small.run(picture)
        if found is None:
            raise ServiceProblem("not_found", "the database has no row of this id, or its pictures are not at hand")
        return Response(found, media_type="image/png", headers={"cache-control": "private, max-age=300"})

    @app.get("/v1/samples", **_says("Some images to try", {"model": SamplesAnswer}, 503))
    async def samples() -> Response:
        guard = state.guard

        def text(pixels: NDArray[Any]) -> str:
            return base64.b64encode(png(pixels)).decode()

        def pictures() -> list[dict[str, Any]]:
            return [
                {"id": one.id, "label": one.class_name, "held_out": one.held_out, "image": text(one.image)}
                for one in guard.samples(SAMPLES)
            ]

        return _json({"samples": await state.small.run(pictures)})

    @app.get(
        "/v1/model",
        **_says(
            "The classifier, the database and the setting of the defence",
            {"content": {"application/json": {"schema": {"type": "object"}}}},
            503,
        ),
    )
    async def model() -> Response:
        guard = state.guard
        return _json(await state.small.run(guard.describe))

    @app.post(
        "/v1/admin/reload",
        **_says("Load the database and the keys again, with no request lost", {"model": ReloadAnswer}, 409),
    )
    async def reload() -> Response:
        return _json(await state.reload())


def _add_probes(app: FastAPI, state: ServingState) -> None:
    @app.get("/healthz", **_says("Whether the process works", {"model": HealthAnswer}, 503))
    async def healthz() -> Response:
        if not state.alive:
            raise ServiceProblem("internal", "the thread that predicts has ended: restart the server", status=503)
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get(
        "/readyz",
        **_says("Whether the database and the classifier are loaded and verified", {"model": HealthAnswer}, 503),
    )
    async def readyz() -> Response:
        if state.stopping:
            raise busy("stopping", "the server is being stopped", 1)
        if state.error is not None:
            raise ServiceProblem("not_ready", "the database could not be loaded: see the server's log")
        state.guard  # noqa: B018  (raises while there is none)
        value: dict[str, Any] = {"status": "ready"}
        if state.last_reload is not None:
            value["last_reload"] = "succeeded" if state.last_reload["ok"] else "failed"
        return _json(value)

    @app.get("/metrics", summary="Counters and latencies for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/problems/{code}", summary="What a problem type means", response_class=Response, responses=problems(404))
    async def problem(code: Annotated[str, Path(max_length=100)]) -> Response:
        text = explain(code)
        if text is None:
            raise ServiceProblem("not_found", "there is no problem of this name")
        return Response(text, media_type="text/plain")


def _add_errors(app: FastAPI) -> None:
    """The framework's own errors become problems, which the envelope answers with."""

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        raise of_status(error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first.get("loc", ()))[:100]
        raise refused("invalid_argument", f"{where}: {first.get('msg', 'not valid')}")
