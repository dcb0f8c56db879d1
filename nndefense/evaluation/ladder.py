"""The ladder: accuracy from clean images up to the worst case over everything that was tried, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nndefense.errors import InputError
from nndefense.statistics import mcnemar_p, wilson_interval

Bits = NDArray[np.bool_]


def to_hex(right: ArrayLike) -> str:
    """Pack N booleans, first image first, into ``ceil(N / 8)`` bytes as hexadecimal digits; spare bits are 0."""
    return np.packbits(np.asarray(right, dtype=np.bool_)).tobytes().hex()


def from_hex(text: str, n: int) -> Bits:
    """The N booleans of :func:`to_hex`.

    Raises:
        InputError: the text does not hold N bits.
    """
    try:
        packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    except ValueError:
        raise InputError("outcomes must be hexadecimal digits: evaluate again") from None
    if len(packed) != -(-n // 8):
        raise InputError(f"outcomes of {n} images need {-(-n // 8)} bytes, but there are {len(packed)}: evaluate again")
    found: Bits = np.unpackbits(packed, count=n).astype(np.bool_)
    return found


# What is said of one attack's images, and of a worst case over several cannot be.
_OF_ONE_ATTACK = (
    "query_limit", "attack_sha256", "attack_version", "certified", "confidence", "confidence_wrong",
)  # fmt: skip
# From the attacker who knows nothing to the one who knows all.
RUNGS = ("clean", "black", "gray", "white", "adaptive", "exact", "worst", "certified")
# Those of attackers who know a defence, and are sent against it alone.
INFORMED = ("white", "adaptive", "exact")
WORST = "worst"
# No attack, but what is proven to stand.
CERTIFIED = "certified"
# What the bare classifier and the defence under test are called in every record.
BARE, DEFENDED = "none", "nearest-neighbor"

PlainRecord = Mapping[str, Any]  # a record as it stands in results.json


# The level of the paired tests.
_LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Two on the same images: those that the first alone (``won``) and that the second alone gets right (``lost``)."""

    won: int
    lost: int

    @property
    def p(self) -> float:
        """Of McNemar's exact two-sided test."""
        return mcnemar_p(self.won, self.lost)

    @property
    def better(self) -> bool:
        """Whether the first is right more often, beyond chance."""
        return self.won > self.lost and self.p <= _LEVEL

    @property
    def worse(self) -> bool:
        """Whether the second is."""
        return self.lost > self.won and self.p <= _LEVEL


@dataclass(frozen=True)
class Comparison:
    """The defence against the bare classifier on the same images.

    Attributes:
        threat_model, norm, eps: which images.
        only_defended, only_bare: images that one of them alone gets right.
        p: McNemar's exact two-sided p-value.
    """

    threat_model: str
    norm: str
    eps: float
    only_defended: int
    only_bare: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        return asdict(self)


def worst_cases(records: Sequence[PlainRecord]) -> list[dict[str, Any]]:
    """For each defence, norm and budget the accuracy on images that every attack within that budget left right.

    An attack at a smaller budget counts at every larger one of its norm, and so does the clean image. Where attackers
    who know a defence were sent against some defences, one that only ignorant attackers met (a variant, say) gets no
    worst case: it would look better than the others for want of an attack.

    Args:
        records: plain records with ``correct``; those of one defence are over the same images.

    Returns:
        records with the threat model ``worst`` and the attack ``all``, in the order of defence, norm and budget.
    """
    found = []
    informed = {record["defense"] for record in records if record["threat_model"] in INFORMED}
    for defense in dict.fromkeys(record["defense"] for record in records):
        if informed and defense not in {BARE, *informed}:
            continue
        own = [record for record in records if record["defense"] == defense and record.get("correct")]
        clean = [record for record in own if record["threat_model"] == "clean"]
        attacked = [record for record in own if record["threat_model"] not in ("clean", WORST, CERTIFIED)]
        for norm in dict.fromkeys(record["norm"] for record in attacked):
            cells = [record for record in attacked if record["norm"] == norm]
            for eps in sorted({record["eps"] for record in cells}):
                within = clean + [record for record in cells if record["eps"] <= eps]
                found.append(_combined(within, next(record for record in cells if record["eps"] == eps)))
    return found


def _combined(records: Sequence[PlainRecord], like: PlainRecord) -> dict[str, Any]:
    n = like["n"]
    right = np.logical_and.reduce([bits(record) for record in records])
    low, high = wilson_interval(int(right.sum()), n)
    return {
        **{name: value for name, value in like.items() if name not in _OF_ONE_ATTACK},
        "threat_model": WORST,
        "attack": "all",
        "steps": 0,
        "restarts": 0,
        "accuracy": int(right.sum()) / n,
        "ci_low": low,
        "ci_high": high,
        "correct": to_hex(right),
        "seconds": 0.0,
        "attack_seconds": 0.0,
        "forwards": 0,
        "backwards": 0,
        "queries": 0,
        "knowledge": max(str(record.get("knowledge") or "") for record in records),
        "surrogate": None,
    }


def compare(records: Sequence[PlainRecord], bare: str = BARE, defended: str = DEFENDED) -> list[Comparison]:
    """McNemar's test of the ``defended`` against the bare classifier, for every cell of ``records`` that has both.

    On shared images (clean, gray and black box) both saw the same pictures. In the worst case each was attacked by what
    is strongest against it, which is the comparison that counts.
    """
    found = []
    cells = {_cell(record): record for record in records if record["defense"] == bare and record.get("correct")}
    for record in records:
        other = cells.get(_cell(record)) if record["defense"] == defended and record.get("correct") else None
        if other is not None:
            pair = paired(record, other)
            cell = record["threat_model"], record["norm"], record["eps"]
            found.append(Comparison(*cell, pair.won, pair.lost, pair.p))
    return found


def paired(first: PlainRecord, second: PlainRecord) -> Paired:
    """Compare the outcomes of two records of the same images."""
    ours, theirs = bits(first), bits(second)
    return Paired(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))


def bits(record: PlainRecord) -> Bits:
    """Which images of a record are right, N booleans."""
    return from_hex(record["correct"], record["n"])


def _cell(record: PlainRecord) -> tuple[Any, ...]:
    names = (
        "threat_model",
        "attack",
        "norm",
        "eps",
        "steps",
        "restarts",
        "query_limit",
        "attack_sha256",
        "attack_version",
    )
    return tuple(record.get(name) for name in names)
