"""The shapes of requests, which are checked by them, and of answers; and the OpenAPI description made of both."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, create_model

from nndefense.guard.prediction import Defended, Neighbor, Opinion, Top, fields_in_json
from nndefense.serving.http.problem import MEDIA_TYPE
from nndefense.serving.http.security import OPEN_FOLDERS, OPEN_PATHS
from nndefense.serving.http.settings import ServingSettings

_CLASS = {"class": "3", "probability": 0.981204}
_NEIGHBOR: dict[str, Any] = {
    "id": "digits/train/104",
    "row": 104,
    "distance": 2.113846,
    "weight": 0.021337,
    "class": "3",
    "class_index": 3,
    "probability": 0.999871,
    "label": "3",
    "top": [{"class": "3", "probability": 0.999871}],
}
_OPINION: dict[str, Any] = {"class": "3", "class_index": 3, "probability": 0.981204, "top": [_CLASS]}
_DEFENDED: dict[str, Any] = {
    **_OPINION,
    "bare": {**_OPINION, "probability": 0.990215, "top": [{"class": "3", "probability": 0.990215}]},
    "agree": True,
    "distance": 2.113846,
    "percentile": 41.37,
    "abstained": False,
    "neighbors": [_NEIGHBOR],
}
_PREDICTIONS: dict[str, Any] = {"predictions": [_DEFENDED], "model": "db80b6be7132c179", "database": "5c1f0e3a77b2d904"}


class ClassProbability(BaseModel):
    """A class and its probability."""

    class_: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


_INNER: dict[Any, Any] = {Top: list[ClassProbability]}


def _declared(shape: Any) -> Any:
    """The model of a shape that the guard declares."""
    fields = {
        name: (_INNER.get(kind, kind), Field(alias=how.name, ge=how.least, le=how.most, description=how.text))
        for name, kind, how in fields_in_json(shape)
    }
    return create_model(shape.__name__, **fields)  # type: ignore[call-overload]


_Opinion: Any = _declared(Opinion)
_Neighbor: Any = _declared(Neighbor)


class OpinionAnswer(_Opinion):  # type: ignore[misc]
    """What a classifier says: its best class and some of the best."""


class NeighborAnswer(_Neighbor):  # type: ignore[misc]
    """One image of the database on which a prediction rests; ``class`` is what the classifier says of it."""


_INNER |= {Opinion: OpinionAnswer, tuple[Neighbor, ...]: list[NeighborAnswer]}
_Defended: Any = _declared(Defended)


class PredictionAnswer(_Defended):  # type: ignore[misc]
    """The defended prediction of one image."""


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"example": value})


class ClassifyAnswer(BaseModel):
    """One prediction for each image, in the order in which they were sent."""

    model_config = _example(_PREDICTIONS)

    predictions: list[PredictionAnswer]
    model: str = Field(description="Fingerprint of the classifier.")
    database: str = Field(description="Fingerprint of the database.")


NUMBERS = {
    "top": (1, "Classes in each list [default: 5]."),
    "neighbors": (0, "Neighbours of each image [default: 10, or K where that is less]."),
}
"""What a request may say of the lists in its answer, in its query, its form or its JSON: the least, and what it is."""
MOST = 10_000_000


def whole_number(name: str, text: str) -> int | None:
    """One of :data:`NUMBERS` from a query or a form; None where the text is no whole number in its range."""
    # Not int() alone, which takes other scripts' digits, underscores and white space.
    found = int(text) if re.fullmatch("[0-9]{1,8}", text) else -1
    return found if NUMBERS[name][0] <= found <= MOST else None


def _whole(value: Any) -> Any:
    # 5.0 is a whole number in JSON; true is none, though Python counts it as one.
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, int) and value > MOST:
        raise ValueError("too large")
    return value


class ClassifyJson(BaseModel):
    """Images as base64."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "images": [
                    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAQElEQVR42gXBgRAAIRAAwJ0IDiGEUEJ4lBAeIYRHCOEQQjiE38XMN0"
                    "DWrolR3bc0kVfSxCFoaohR6HfuA57c+AGp/hIXv58N8wAAAABJRU5ErkJggg=="
                ],
                "top": 3,
                "neighbors": 5,
            }
        },
    )

    images: Annotated[list[str], FailFast()] = Field(min_length=1, description="Image files in base64.")
    top: Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole)] | None = Field(
        default=None, description="Classes in each list."
    )
    neighbors: Annotated[int, Field(strict=True, ge=0), BeforeValidator(_whole)] | None = Field(
        default=None, description="Neighbours of each image; 10 by default."
    )


class ProblemAnswer(BaseModel):
    """An error (RFC 9457)."""

    model_config = _example(
        {
            "type": "/problems/damaged_image",
            "title": "Damaged image",
            "status": 422,
            "detail": "the image ends too early: send the whole file",
            "code": "damaged_image",
            "instance": "urn:uuid:3b1e6e0e-54a1-4b8e-9a51-0a7bb3c0a6b5",
        }
    )

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str | None = None


class HealthAnswer(BaseModel):
    """Whether the process works, or is ready for requests."""

    model_config = _example({"status": "ok"})

    status: str


class ReloadAnswer(BaseModel):
    """What a reload came to."""

    model_config = _example(
        {"ok": True, "database": "5c1f0e3a77b2d904", "model": "db80b6be7132c179", "changed": True, "seconds": 1.204}
    )

    ok: bool
    database: str
    model: str
    changed: bool
    seconds: float


class SampleAnswer(BaseModel):
    """An image to try."""

    id: str
    label: str | None
    held_out: bool = Field(description="Whether the database does not hold it.")
    image: str = Field(description="PNG in base64.")


class SamplesAnswer(BaseModel):
    """Some images to try."""

    model_config = _example(
        {"samples": [{"id": "digits/test/7", "label": "3", "held_out": True, "image": "iVBORw0KGgo="}]}
    )

    samples: list[SampleAnswer]


_MEANINGS = {
    400: "The body cannot be understood.",
    401: "A key is needed.",
    403: "Not allowed.",
    404: "There is nothing here.",
    405: "This method does not work here.",
    408: "The body came too slowly.",
    409: "The new database could not be loaded; the old one keeps serving.",
    413: "Too much of something: bytes, parts, images or pixels.",
    415: "Not an image format that is read here, or not the one that was declared.",
    421: "The service does not answer under that name.",
    422: "An argument out of range, or an image that cannot be decoded.",
    431: "The path and the headers are too large.",
    503: "Too busy, or not ready; Retry-After says when to try again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of answers with problem details."""
    schema = {"$ref": "#/components/schemas/ProblemAnswer"}
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": schema}},
            **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if status == 503 else {}),
        }
        for status in statuses
    }


def describe(app: FastAPI, settings: ServingSettings) -> None:
    """Make ``app.openapi`` complete: shapes of bodies that routes read themselves, keys, and errors of every route."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        value = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            description="Predictions of the nearest-neighbour defence, with the neighbours that they rest on. "
            "Errors are problem details (RFC 9457).",
            license_info=None,
        )
        schemas = value.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for model in (ClassifyJson, ProblemAnswer):
            schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        keyed = settings.api_key_file is not None
        if keyed:
            value["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        for path, methods in value["paths"].items():
            closed = keyed and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS)
            for method, operation in methods.items():
                everywhere = [400, 413, 421, 431, *([401, 403] if closed else []), *([403] if method == "post" else [])]
                answers = operation["responses"]
                # The framework describes its own form of this one, which is never sent.
                if MEDIA_TYPE not in answers.get("422", {}).get("content", {}) and "422" in answers:
                    answers.update({"422": problems(422)[422]})
                for status, answer in problems(*everywhere).items():
                    answers.setdefault(str(status), answer)
                if closed:
                    operation["security"] = [{"bearer": []}, {"header": []}]
        app.openapi_schema = value
        return value

    app.openapi = openapi  # type: ignore[method-assign]
