"""The shapes of requests, which are checked by them, and of answers, for the OpenAPI description."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, create_model

from nndefense.guard.prediction import Defended, Neighbor, Opinion, Top, fields_in_json

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
