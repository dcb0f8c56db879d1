"""The door of the attacks: images, labels and numbers of any type come in, and images of the caller's own go out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nndefense.attacks import norms
from nndefense.attacks.losses import Loss, Model
from nndefense.attacks.wrappers import Around, Bpda
from nndefense.errors import InputError, plain
from nndefense.modes import outside_inference_mode

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How often an image is shrunk towards the clean one until its rounding lies inside an l2 ball, each time by more.
_SHRINKS = 10

Call = TypeVar("Call", bound=Callable[..., Any])


def any_type(attack: Call) -> Call:
    """The attack, whose first arguments are model, images and labels, for what callers really hold.

    Numbers of NumPy and tensors of one number become Python's; labels and targets of any integer type become int64.
    Images are attacked in float32, or in float64 where the model takes that, and the model sees them in its own type,
    rounded as the result will be. Gradients are taken wherever the call stands, also under torch.inference_mode. The
    result is of the images' type, and inside the ball as it is measured exactly.
    """
    return _door(attack, {16, 32, 64})


def wide_types(attack: Call) -> Call:
    """As :func:`any_type`, but float16 and bfloat16 images are refused: a rounding could undo what is found."""
    return _door(attack, {32, 64})


def float32_alone(attack: Call) -> Call:
    """As :func:`any_numbers`, and only float32 images are taken: for proofs about the images as they are."""
    return _door(attack, {32})


def any_numbers(attack: Call) -> Call:
    """As :func:`any_type` for labels and numbers alone, for attacks that are made of others."""
    return _door(attack, set())


def _door(attack: Call, widths: set[int]) -> Call:
    form = inspect.signature(attack)
    first, second, third = list(form.parameters)[:3]
    rest = next((name for name, each in form.parameters.items() if each.kind is each.VAR_KEYWORD), "")
    eps, norm = form.parameters.get("eps"), form.parameters.get("norm")
    # An eps that may be left out only says where a search for the least change may stop.
    bounded = eps is not None and eps.default is inspect.Parameter.empty

    @functools.wraps(attack)
    @outside_inference_mode
    def call(*args: Any, **settings: Any) -> Any:
        given = dict(form.bind(*args, **settings).arguments)
        given |= given.pop(rest, {})
        model, x, y = (given.pop(name) for name in (first, second, third))
        given = {third: labels_of(y), **{name: _number(value) for name, value in given.items()}}

        def attacked(model: Any, x: Tensor) -> Any:
            return attack(**{first: model, second: x, **given})

        if not widths or not isinstance(x, Tensor) or x.dtype not in _FLOATS:
            return attacked(model, x)
        if torch.finfo(x.dtype).bits not in widths:
            raise InputError(
                f"images are {str(x.dtype).removeprefix('torch.')}, and what this attack says of them could be undone "
                "by a rounding: give x.float()"
            )
        ball = (given["eps"], given.get("norm", norm.default if norm else "")) if bounded else None
        return in_working_type(attacked, model, x, ball)

    return call  # type: ignore[return-value]


def in_working_type(
    attack: Callable[[Any, Tensor], Any], model: Any, x: Tensor, ball: tuple[float | Tensor, str] | None
) -> Any:
    """Attack images in the type that attacks compute in, and give the result in theirs.

    Args:
        attack: model and images -> images, or a record with ``images``.
        model: what it attacks: a model, or the surface of a defence that retrieves.
        x: images N x C x H x W.
        ball: eps and norm that the result must keep to, or None where there is only the box.
    """
    seen = x.to(_working_type(model, x))
    model = adapted(model, x)
    if seen is x:
        return attack(model, x)
    found = attack(model, seen)
    if isinstance(found, Tensor):
        return _returned(found, seen, x, ball)
    return replace(found, images=_returned(found.images, seen, x, ball))


def widened(model: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Model and images in the type that attacks compute in, where what is made is no image of the caller's."""
    x = x.to(_working_type(model, x))
    return adapted(model, x), x


def labels_of(y: Any) -> Any:
    """Labels of any integer type as int64; anything else as it is, for the check of labels to judge."""
    whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype is torch.bool)
    return y.long() if whole else y


def adapted(model: Any, x: Tensor) -> Any:
    """The model for images in the type that attacks compute in, which become ``x.dtype`` in the end, and for ``x``."""
    takes, work = _type_taken(model), _working_type(model, x)
    # Float32 images are given to whatever does not say otherwise. A surface of retrieval is no callable: what it holds
    # takes the working type.
    if (takes in (None, x.dtype) and x.dtype is work and work is torch.float32) or takes is work is x.dtype:
        return model
    return _Adapted(model, x.dtype, takes, work) if callable(model) else model


def _type_taken(model: Any) -> torch.dtype | None:
    """The type of images that a model takes: its parameters', or its buffers'; None where it does not say."""
    declared = getattr(model, "takes", None)
    if isinstance(declared, torch.dtype) or not isinstance(model, nn.Module):
        return declared if isinstance(declared, torch.dtype) else None
    for tensors in (model.parameters(), model.buffers()):
        if types := {tensor.dtype for tensor in tensors if tensor.dtype in _FLOATS}:
            return types.pop() if len(types) == 1 else None
    return None


def _working_type(model: Any, x: Tensor) -> torch.dtype:
    """Float64 where the model takes that, or may; else float32."""
    takes = _type_taken(model)
    if takes is None and callable(model):
        takes = x.dtype
    return torch.float64 if takes is torch.float64 else torch.float32


class _Adapted(Around):
    """A model that is given its own type of images, rounded as the caller's, and gives logits of the working type.

    One that does not say its type is given the caller's, and float32 if it fails on that in its first call.
    """

    def __init__(self, model: Model, given: torch.dtype, takes: torch.dtype | None, work: torch.dtype) -> None:
        super().__init__(model)
        #: What it is given, for an attack that makes others.
        self.takes = work
        self.inner, self.asked = takes or given, takes is not None
        coarse = torch.finfo(given).eps > torch.finfo(work).eps
        self.rounded = Bpda(lambda images: images.to(given).to(work)) if coarse else None

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits: N x C x H x W -> N x K."""
        return self._answer(self._asked(self.model, x))

    def _expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        call: Any = self.model.expected_loss  # type: ignore[attr-defined]
        logits, losses = self._asked(lambda seen: call(seen, y, loss), x)
        return self._answer(logits), self._answer(losses)

    def _predictions(self, x: Tensor, progress: float | None = None) -> Tensor:
        call: Any = self.model.predictions  # type: ignore[attr-defined]
        return self._answer(self._asked(lambda seen: call(seen, progress), x))

    def _asked(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        seen: Tensor = x if self.rounded is None else self.rounded(x)
        if not self.asked:
            self.asked = True
            try:
                return call(seen.to(self.inner))
            except RuntimeError:
                # Torch's own, where types differ; any other comes again.
                self.inner = torch.float32
        return call(seen.to(self.inner))

    def _answer(self, answer: Tensor) -> Tensor:
        return answer.to(self.takes) if isinstance(answer, Tensor) else answer


def _number(value: Any) -> Any:
    """A setting as the attacks take it: one number as Python's, several as a tensor, whole ones as int64."""
    value = plain(value)
    return labels_of(torch.as_tensor(value) if hasattr(value, "__array__") else value)


def _returned(found: Tensor, seen: Tensor, x: Tensor, ball: tuple[float | Tensor, str] | None) -> Tensor:
    """Attacked images of the working type in the type of the clean ones ``x``, which are ``seen`` in the other."""
    # MPS has no float64.
    clean = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    # What was not changed must not be changed by two roundings.
    moved = torch.where(found == seen, clean, found.to(clean.dtype))
    if ball is None:
        return moved.to(x.dtype)
    eps, norm = ball
    radii = norms.in_pixels(clean, eps, norm)
    limit = norms.per_image(radii, clean)
    if norm == "linf":
        out = torch.minimum(torch.maximum(moved, clean - limit), clean + limit).to(x.dtype)
        return torch.where((out.to(clean.dtype) - clean).abs() > limit, torch.nextafter(out, x), out)
    out, share = moved.to(x.dtype), torch.ones_like(limit)
    for attempt in range(_SHRINKS):
        size = norms.per_image(norms.length(out.to(clean.dtype) - clean), clean)
        if bool((size <= limit).all()):
            return out
        share = torch.where(size > limit, share * (limit / size) * (1 - 1e-6 * 4**attempt), share)
        out = torch.where(size > limit, (clean + share * (moved - clean)).to(x.dtype), out)
    return torch.where(norms.per_image(norms.length(out.to(clean.dtype) - clean), clean) > limit, x, out)
