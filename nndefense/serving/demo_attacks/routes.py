"""Attacks for the page: one picture at a time, within limits, and stopped as soon as nobody waits for the answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nndefense.attacks import distance
from nndefense.errors import InputError
from nndefense.guard import Guard, Opinion
from nndefense.serving.demo_attacks.attack import (
    AttackJob,
    AttackName,
    AttackTarget,
    AttackWatch,
    Late,
    NormName,
    Stopped,
    attack_picture,
    eight_bits,
    magnified,
    png_text,
)
from nndefense.serving.http.bodies import read_json
from nndefense.serving.http.problem import ServiceProblem
from nndefense.serving.http.schema import PredictionAnswer, problems
from nndefense.serving.http.state import ServingState
from nndefense.serving.pictures.apart import decode_images
from nndefense.serving.pictures.decode import from_base64
from nndefense.serving.pictures.limits import Limits, refused

STEPS = 20
"""Gradient steps that the page asks for; of the adaptive attack, what its rounds are shares of."""
MOST_STEPS = 50
MOST_EPS = {"normalized-l2": 0.5, "linf": 76 / 255}
"""The largest size of an attack, in units of its norm."""
MOST_VALUES = 3 * 256 * 256
"""The largest input, C x H x W, that is attacked."""
MOST_ROW_BYTES = 2**30
"""The largest database, as float32 vectors and posteriors, that the adaptive attack takes into memory."""
SECONDS = 20.0
"""The longest attack."""
LEAST_LIKELY = "least-likely"
"""As a target the class that the classifier holds for the least likely of the picture."""
_LOOK = 0.1


class AttackRequest(BaseModel):
    """Which picture to attack, and how."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "image": "iVBORw0KGgo…",
                "attack": "classifier",
                "norm": "normalized-l2",
                "eps": 0.2,
                "steps": 20,
            }
        },
    )

    image: str = Field(description="An image file in base64, as for /v1/classify.")
    attack: AttackName = Field(
        "classifier",
        description="classifier: PGD that ignores the defence; defense: the adaptive attack, which knows all.",
    )
    norm: NormName = Field(
        "normalized-l2", description="normalized-l2: eps is a share of the image's length; linf: eps is per pixel."
    )
    eps: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="At most 0.5, or 76/255 per pixel.")
    target: str | None = Field(
        None,
        max_length=1000,
        description="On the classifier: the class to reach, by name, id or number, or least-likely; null: any other.",
    )
    steps: int = Field(
        STEPS, ge=1, le=MOST_STEPS, description="Gradient steps; of the adaptive attack, those of a whole round."
    )
    top: int = Field(5, ge=1, le=100_000, description="Classes in each list.")
    neighbors: int = Field(10, ge=0, le=100_000, description="Neighbours of each image.")


class AttackedPicture(BaseModel):
    """A picture, and what is said of it."""

    image: str = Field(description="PNG in base64.")
    prediction: PredictionAnswer


class DifferencePicture(BaseModel):
    """What an attack changed, on mid grey."""

    image: str = Field(description="PNG in base64.")
    magnification: int


class Flipped(BaseModel):
    """Whether the class changed; an abstention is no change."""

    bare: bool
    defended: bool


class AttackAnswer(BaseModel):
    """An attacked picture beside the clean one. Both have 8 bits a channel, and the predictions are of them as such."""

    attack: AttackName
    norm: NormName
    eps: float
    steps: int
    away_from: str = Field(description="The class that was predicted before; the true one is not known.")
    towards: str | None = Field(description="The class to reach; null: any other.")
    bits: int
    size: dict[str, float] = Field(description="What the change measures after rounding: linf, l2 and normalized-l2.")
    clean: AttackedPicture
    attacked: AttackedPicture
    difference: DifferencePicture
    flipped: Flipped
    seconds: float


def _read(body: bytes, content_type: str, limits: Limits) -> AttackRequest:
    """Take a body apart, by the rules of ``/v1/classify``; in a worker thread."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise refused("unsupported_media_type", "the content type must be application/json")
    try:
        return AttackRequest.model_validate(read_json(body, limits))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:100] or "the JSON body"
        raise refused("invalid_argument", f"{place}: {first['msg']}") from None


def _decode(image: str, limits: Limits, shape: tuple[int, int, int]) -> Tensor:
    """The image of a body, 1 x C x H x W with 8 bits a channel; in a worker thread."""
    return eight_bits(torch.stack(decode_images([from_base64(image, limits)], limits, shape)))


def _aim(guard: Guard, wanted: AttackRequest, before: Opinion) -> int | None:
    """The number of the class to reach, or None for any other than the one predicted before."""
    if wanted.target is None:
        return None
    if wanted.attack == "defense":
        raise refused("invalid_argument", "target: the attack on the defence cannot be sent towards a class")
    if wanted.target == LEAST_LIKELY:
        return int(np.argmin(before.probabilities))
    try:
        aim = guard.classifier.class_number(wanted.target)
    except InputError as error:
        raise refused("invalid_argument", f"target: {error}") from None
    if aim == before.class_index:
        raise refused("invalid_argument", f"target: the picture is taken for {before.class_name} already")
    return aim


def offer(guard: Guard) -> dict[str, Any]:
    """What the page may offer for the database of this ``guard``: ``attacks`` (with a ``reason`` for one that is left
    out), ``norms`` with ``most``, ``step`` and ``text``, and ``steps``.
    """
    allowed, reason = ["classifier", "defense"], ""
    channels, height, width = guard.classifier.input_shape
    rows, dimension = len(guard.database), guard.database.manifest.dimension
    if channels * height * width > MOST_VALUES:
        allowed, reason = [], f"pictures of {height} x {width} take too long to attack here"
    elif 4 * rows * (dimension + len(guard.classes) + 2) > MOST_ROW_BYTES:
        allowed, reason = ["classifier"], "not here: the database is too large to hold in memory once more"
    return {
        "attacks": allowed,
        "reason": reason,
        "steps": STEPS,
        "norms": {
            "normalized-l2": {"most": MOST_EPS["normalized-l2"], "step": 0.01, "text": "ℓ₂, share of its length"},
            "linf": {"most": MOST_EPS["linf"], "step": 1 / 255, "text": "ℓ∞, change of a pixel"},
        },
    }


def router(state: ServingState) -> APIRouter:
    """``POST /v1/demo/attack`` of the service ``state``; to be included only where the operator has asked for it."""
    routes = APIRouter()
    # Made when the first attack on a guard asks for it, and kept while that guard lives.
    targets: WeakKeyDictionary[Guard, AttackTarget] = WeakKeyDictionary()

    @routes.post(
        "/v1/demo/attack",
        summary="Attack an image on the server",
        response_class=JSONResponse,
        responses={200: {"model": AttackAnswer}, **problems(400, 408, 413, 415, 422, 503)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": AttackRequest.model_json_schema()}},
            }
        },
    )
    async def demo_attack(request: Request) -> JSONResponse:
        """Attack an image away from the class that it is predicted as now, and predict the result.

        The true class of the image is not known here. Both images are rounded to 8 bits a channel before they are
        predicted, so the PNGs of the answer give the same predictions when they are sent to `/v1/classify`.
        """
        guard, limits = state.guard, state.settings.limits
        state.batcher.check_room(1, state.settings.timeout)
        # Not by the framework, which would take a body of any form apart in the event loop.
        kind = request.headers.get("content-type", "")
        wanted = await state.small.run(_read, await request.body(), kind, limits)
        allowed = offer(guard)
        if wanted.attack not in allowed["attacks"]:
            raise refused("invalid_argument", f"this attack is not offered: {allowed['reason']}")
        most = MOST_EPS[wanted.norm]
        if wanted.eps > most * (1 + 1e-9):
            raise refused("invalid_argument", f"eps is {wanted.eps:g}, but must be at most {most:g} in {wanted.norm}")
        clean = (await state.small.run(_decode, wanted.image, limits, guard.input_shape))[0]
        before = (await state.submit([clean], wanted.top, wanted.neighbors, guard=guard))[0]
        leaving = before.bare if wanted.attack == "classifier" else before
        aim = _aim(guard, wanted, before.bare)
        label = leaving.class_index if aim is None else aim
        job = AttackJob(clean[None], label, aim is not None, wanted.attack, wanted.norm, wanted.eps, wanted.steps)
        begun = time.monotonic()
        attacked = (await _while_awaited(request, state, guard, job))[0]
        seconds = time.monotonic() - begun
        after = (await state.submit([attacked], wanted.top, wanted.neighbors, guard=guard))[0]
        shown, magnification = magnified(attacked - clean)
        sizes = {norm: float(distance(clean[None], attacked[None], norm)) for norm in ("linf", "l2")}
        sizes["normalized-l2"] = sizes["l2"] / max(float(clean.norm()), 1e-12)
        return JSONResponse(
            {
                **wanted.model_dump(include={"attack", "norm", "eps", "steps"}),
                "away_from": leaving.class_name,
                "towards": None if aim is None else guard.classes[aim],
                "bits": 8,
                "size": {name: float(f"{value:.6g}") for name, value in sizes.items()},
                "clean": {"image": png_text(clean), "prediction": before.to_json()},
                "attacked": {"image": png_text(attacked), "prediction": after.to_json()},
                "difference": {"image": png_text(shown), "magnification": magnification},
                "flipped": {
                    "bare": after.bare.class_index != before.bare.class_index,
                    "defended": after.class_index != before.class_index,
                },
                "seconds": round(seconds, 3),
            }
        )

    async def _while_awaited(request: Request, state: ServingState, guard: Guard, job: AttackJob) -> Tensor:
        """The attacked image; the attack ends early where the client has gone."""
        watch = AttackWatch(SECONDS)

        def run() -> Tensor:
            watch.wanted()
            target = targets.get(guard) or targets.setdefault(guard, AttackTarget(guard))
            if job.attack == "defense":
                # What takes long the first time is no part of the attack's own time.
                target.prepare()
            return attack_picture(target, job, watch)

        running = asyncio.ensure_future(state.slow.run(run))
        try:
            while not (await asyncio.wait({running}, timeout=_LOOK))[0]:
                if await request.is_disconnected():
                    watch.stop()
            return await running
        except Late:
            detail = f"the attack took longer than {SECONDS:g} seconds: take fewer steps, or attack the classifier"
            raise ServiceProblem("timed_out", detail) from None
        except Stopped:
            raise ServiceProblem("stopping", "nobody waited for this attack any more") from None
        finally:
            watch.stop()

    return routes
