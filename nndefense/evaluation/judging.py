"""Who judges, and how sure: a defence that draws at random is asked over many fresh draws, any other once."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

FRESH_DRAWS = 20


def is_random(model: nn.Module) -> bool:
    """Whether a defence draws: it says so by ``random``, and ``with_seed(seed)`` begins its draws at a seed."""
    return bool(getattr(model, "random", False)) and callable(getattr(model, "with_seed", None))


def draw_seeds(seed: int) -> list[int]:
    """The seeds of the fresh draws of an evaluation with this seed.

    An attacker's draws come from torch's default generator under ``seed`` itself, so that none of these is his.
    """
    hashed = (hashlib.sha256(f"fresh draw {number} of {seed}".encode()).digest() for number in range(FRESH_DRAWS))
    # 53 bits, which every reader of JSON keeps.
    return [int.from_bytes(one[:8], "big") >> 11 for one in hashed]


def judges_of(model: nn.Module, seed: int) -> list[nn.Module]:
    """The defence once for each fresh draw, or itself where nothing is random."""
    if not is_random(model):
        return [model]
    return [model.with_seed(one) for one in draw_seeds(seed)]  # type: ignore[operator]


def confident(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The class that is answered, and its probability: logits or log-probabilities N x K -> N and N.

    The probability is 0 where the scores are no numbers.
    """
    said = scores.argmax(1)
    return said, scores.softmax(1).gather(1, said[:, None])[:, 0].nan_to_num()


def refuted_among(model: nn.Module, right: Tensor, images: Tensor, truth: Tensor) -> list[Tensor]:
    """Of images that most judges (judges x N) get wrong, those whose class is another one beyond doubt: N, on the CPU.

    A model says so by ``refutes(images, classes)``; of others there is nothing to say.
    """
    if not callable(refutes := getattr(model, "refutes", None)):
        return []
    found, wrong = torch.zeros(len(images), dtype=torch.bool), (right.mean(0) <= 0.5).cpu()
    if wrong.any():
        here = wrong.to(images.device)
        found[wrong] = refutes(images[here], truth[here]).cpu()
    return [found]
