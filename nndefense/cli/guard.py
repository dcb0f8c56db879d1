"""What ``nndefense guard`` does, as functions of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nndefense.cli import inputs, output
from nndefense.errors import InputError
from nndefense.guard import Guard
from nndefense.guard.percentile import FILE, check_rate

# False-rejection rates whose thresholds are printed.
_RATES = (0.01, 0.05, 0.1)


def calibrate(
    folder: Path,
    specs: Sequence[str],
    source: str | None,
    *,
    reject_rate: float | None,
    out: Path | None,
    overwrite: bool,
    limit: int | None,
    batch_size: int,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Calibrate the guard of a database on clean images and store what was found."""
    if reject_rate is not None:
        check_rate(reject_rate)
    path = folder / FILE if out is None else out
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another file, or --overwrite")
    guard = Guard.open(
        folder, source, device=device, classes=classes, input_shape=input_shape, data_dir=data_dir, calibration=False
    )
    dataset = inputs.open_datasets(specs, data_dir=data_dir, like=guard.classifier, limit=limit, seed=seed)
    found = guard.calibrate(dataset, specs=specs, reject_rate=reject_rate, batch_size=batch_size)
    found.write(path)
    rates = [rate for rate in (*_RATES, *([reject_rate] if reject_rate else [])) if rate >= 1 / (len(found) + 1)]
    thresholds = {rate: found.threshold(rate) for rate in sorted(set(rates))}
    lines = [f"{path}: {len(found):,} images of {dataset.name}, median distance {found.distances[len(found) // 2]:.4g}"]
    lines += [f"  abstaining on {rate:.1%} of clean images: beyond {far:.4g}" for rate, far in thresholds.items()]
    output.show(
        {
            "file": str(path),
            "n": len(found),
            "dataset": found.dataset["name"],
            "reject_rate": reject_rate,
            "thresholds": [{"reject_rate": rate, "distance": far} for rate, far in thresholds.items()],
        },
        "\n".join(lines),
        as_json,
    )
