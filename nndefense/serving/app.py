"""The HTTP application: routes around a :class:`~nndefense.serving.http.state.ServingState`."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

try:
    from fastapi import FastAPI, Path, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
except ImportError as error:  # pragma: no cover
    from nndefense.errors import InputError

    raise InputError('the service needs packages that are not installed: pip install "nndefense[serve]"') from error

from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from torch import Tensor

from nndefense import __version__
from nndefense.errors import InputError
from nndefense.guard.prediction import Defended
from nndefense.serving import demo_attacks, pages
from nndefense.serving.http.bodies import parse
from nndefense.serving.http.envelope import Envelope
from nndefense.serving.http.openapi import describe, problems
from nndefense.serving.http.problem import ServiceProblem, busy, explain, of_status
from nndefense.serving.http.schema import ClassifyAnswer, HealthAnswer, ReloadAnswer, SamplesAnswer
from nndefense.serving.http.security import BodyLimit
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import ServingState
from nndefense.serving.pictures.decode import decode_all
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits
from nndefense.serving.pictures.refused import refused

if TYPE_CHECKING:
    from nndefense.guard import Guard

SAMPLES = 8
TOP = 5
# Of the 50 that a defence may have, most clients look at none; all of them make an answer of 17 KB.
NEIGHBORS = 10
MOST = 10_000_000
_NUMBERS = {
    "top": (1, "Classes in each list [default: 5]."),
    "neighbors": (0, "Neighbours of each image [default: 10, or K where that is less]."),
}


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
    limiter: list[BodyLimit] = []

    def limited(inner: Any) -> BodyLimit:
        limiter.append(BodyLimit(inner, settings, state.metrics.part["body"].observe))
        return limiter[-1]

    state.metrics.watch(lambda: state.batcher.waiting, lambda: sum(one.buffered for one in limiter))
    # The last one added is the outermost.
    app.add_middleware(limited)
    app.add_middleware(
        Envelope, gate=state.gate, metrics=state.metrics, journal=state.journal.put if state.journal else None
    )
    return app


def answer_json(predictions: Sequence[Defended], model: str, database: str) -> bytes:
    """The answer to a classification: exactly the JSON of the predictions that the Python call gives."""
    value = {"predictions": [one.to_json() for one in predictions], "model": model, "database": database}
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def png(pixels: NDArray[Any]) -> bytes:
    """Encode uint8 pixels H x W x C (C 1 or 3) or H x W as PNG."""
    out = io.BytesIO()
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(flat).save(out, "PNG")
    return out.getvalue()


def _read(
    body: bytes, content_type: str | None, limits: Limits, shape: tuple[int, int, int]
) -> tuple[list[Tensor], int | None, int | None]:
    """Take a body apart and decode its images; in a worker thread."""
    upload = parse(body, content_type, limits)
    images = decode_all([(part.data, part.media_type) for part in upload.images], limits, shape)
    return images, upload.top, upload.neighbors


def _add_classify(app: FastAPI, state: ServingState) -> None:
    limits, parts = state.settings.limits, state.metrics.part

    @app.post(
        "/v1/classify",
        summary="Classify one or many images",
        response_class=Response,
        responses={
            200: {"model": ClassifyAnswer, "description": "A prediction for each image, in their order."},
            **problems(400, 408, 413, 415, 422, 503),
        },
        openapi_extra={
            "parameters": [
                {
                    "name": name,
                    "in": "query",
                    "description": text,
                    "schema": {"type": "integer", "minimum": least, "maximum": MOST},
                }
                for name, (least, text) in _NUMBERS.items()
            ],
            "requestBody": {
                "required": True,
                "description": "Images as multipart files named ``files``, one image as it is, or base64 in JSON.",
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "required": ["files"],
                            "properties": {
                                "files": {
                                    "type": "array",
                                    "minItems": 1,
                                    "maxItems": limits.max_images,
                                    "items": {"type": "string", "format": "binary"},
                                },
                                "top": {"type": "integer", "minimum": 1, "maximum": MOST},
                                "neighbors": {"type": "integer", "minimum": 0, "maximum": MOST},
                            },
                        }
                    },
                    "application/json": {"schema": {"$ref": "#/components/schemas/ClassifyJson"}},
                    **{name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES},
                },
            },
        },
    )
    async def classify(request: Request) -> Response:
        # Read here and not by the framework, which would take as long for these two as for all else.
        top, neighbors = _number(request, "top"), _number(request, "neighbors")
        # The whole request is served by one guard, also where it is replaced meanwhile.
        guard = state.guard
        state.admit()
        body, kind = await request.body(), request.headers.get("content-type")
        begun = time.perf_counter()
        images, own_top, own_neighbors = await state.run_blocking(
            _read, body, kind, limits, guard.classifier.input_shape
        )
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
    least = _NUMBERS[name][0]
    # Not int() alone, which takes other scripts' digits, underscores and white space.
    if len(found) > 1 or not re.fullmatch("[0-9]{1,8}", found[0]) or not least <= int(found[0]) <= MOST:
        raise refused("invalid_argument", f"{name} must stand there once, as a whole number from {least} to {MOST}")
    return int(found[0])


def _add_pictures(app: FastAPI, state: ServingState) -> None:
    @app.get(
        "/v1/neighbors/{id:path}/image",
        summary="The picture of a row of the database",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **problems(404, 422, 503),
        },
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

        found = await state.run_blocking(picture)
        if found is None:
            raise ServiceProblem("not_found", "the database has no row of this id, or its pictures are not at hand")
        return Response(found, media_type="image/png", headers={"cache-control": "private, max-age=300"})

    @app.get(
        "/v1/samples",
        summary="Some images to try",
        response_class=Response,
        responses={200: {"model": SamplesAnswer}, **problems(503)},
    )
    async def samples() -> Response:
        guard = state.guard

        def pictures() -> bytes:
            found = [
                {
                    "id": one.id,
                    "label": one.class_name,
                    "held_out": one.held_out,
                    "image": base64.b64encode(png(one.image)).decode(),
                }
                for one in guard.samples(SAMPLES)
            ]
            return json.dumps({"samples": found}).encode()

        return Response(await state.run_blocking(pictures), media_type="application/json")

    @app.get(
        "/v1/model",
        summary="The classifier, the database and the setting of the defence",
        response_class=Response,
        responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}, **problems(503)},
    )
    async def model() -> Response:
        guard = state.guard
        value = await state.run_blocking(guard.describe)
        return Response(json.dumps(value, ensure_ascii=False).encode(), media_type="application/json")

    @app.post(
        "/v1/admin/reload",
        summary="Load the database and the keys again, with no request lost",
        response_class=Response,
        responses={200: {"model": ReloadAnswer}, **problems(409)},
    )
    async def reload() -> Response:
        return Response(json.dumps(await state.reload()).encode(), media_type="application/json")


def _add_probes(app: FastAPI, state: ServingState) -> None:
    @app.get(
        "/healthz",
        summary="Whether the process works",
        response_class=Response,
        responses={200: {"model": HealthAnswer}, **problems(503)},
    )
    async def healthz() -> Response:
        if not state.alive:
            raise ServiceProblem("internal", "the thread that predicts has ended: restart the server", status=503)
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get(
        "/readyz",
        summary="Whether the database and the classifier are loaded and verified",
        response_class=Response,
        responses={200: {"model": HealthAnswer}, **problems(503)},
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
        return Response(json.dumps(value).encode(), media_type="application/json")

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
