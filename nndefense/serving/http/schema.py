"""The shapes of requests and answers, for the OpenAPI description; answers themselves are written without them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

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


class ClassifyAnswer(BaseModel):
    """One prediction for each image, in the order in which they were sent."""

    model_config = ConfigDict(json_schema_extra={"example": _PREDICTIONS})

    predictions: list[PredictionAnswer]
    model: str = Field(description="Fingerprint of the classifier.")
    database: str = Field(description="Fingerprint of the database.")


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

    images: list[str] = Field(min_length=1, description="Image files in base64.")
    top: int | None = Field(default=None, ge=1, description="Classes in each list.")
    neighbors: int | None = Field(default=None, ge=0, description="Neighbours of each image; 10 by default.")


class ProblemAnswer(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "/problems/damaged_image",
                "title": "Damaged image",
                "status": 422,
                "detail": "the image ends too early: send the whole file",
                "code": "damaged_image",
                "instance": "urn:uuid:3b1e6e0e-54a1-4b8e-9a51-0a7bb3c0a6b5",
            }
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

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ok"}})

    status: str


class ReloadAnswer(BaseModel):
    """What a reload came to."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "ok": True,
                "database": "5c1f0e3a77b2d904",
                "model": "db80b6be7132c179",
                "changed": True,
                "seconds": 1.204,
            }
        }
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

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"samples": [{"id": "digits/test/7", "label": "3", "held_out": True, "image": "iVBORw0KGgo="}]}
        }
    )

    samples: list[SampleAnswer]
