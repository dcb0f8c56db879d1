"""Total variation minimisation against scikit-image's Chambolle and ART's TotalVarMin, side by side in one run.

scikit-image solves the unmasked isotropic problem, and stops where its own rule says. So the comparison is made at
equal objective: first it runs, at several settings of its ``eps``, and each image's objective is measured; then the
loosest tolerance is found at which our objective for that image is no higher; then both are timed in turns, batch 32,
and the median of the rounds' ratios is printed. What finding the tolerance cost is not part of the time.

ART's TotalVarMin minimises what is ``kind="lines", data="norm"`` here, each channel by itself, with a mask per entry.
So that comparison is at equal objective too, on ART's own masks: ours stops at the smallest number of iterations after
which no channel lies higher. ART pins old packages; it runs in the environment of `make oracle`, and is left out where
that is not there. Beside it stands the time of the masked problem that our defence solves, to a proved gap of 1e-3.

Usage: python benchmarks/total_variation.py --images data/imagenet_sample [--out benchmarks/total_variation.json]
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from nndefense.defenses.transforms import TvProblem, minimize_total_variation

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 224
TOLERANCES = [0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.015, 0.01, 7e-3, 5e-3, 3.5e-3, 2.5e-3, 1.5e-3, 1e-3]
TOLERANCES += [7e-4, 5e-4, 3.5e-4, 2.5e-4, 1.5e-4, 1e-4, 7e-5, 5e-5]
ART_WEIGHT = 0.5
IN_ART = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
torch.set_num_threads(int(sys.argv[2]))
clock = time.process_time if int(sys.argv[2]) == 1 else time.perf_counter
from art.defences.preprocessor import TotalVarMin
images = np.load(sys.argv[1])["images"]
defence = TotalVarMin(max_iter=int(sys.argv[3]))
np.random.seed(0)
keep = np.stack([np.random.rand(*one.shape) < defence.prob for one in images])
np.random.seed(0)
begun = clock()
found, _ = defence(images)
seconds = (clock() - begun) / len(images)
np.savez(sys.argv[1], images=found, keep=keep, seconds=seconds)
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=REPOSITORY / "data" / "imagenet_sample")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weight", type=float, default=0.03)
    parser.add_argument("--eps", default="2e-4,1e-5,1e-6", help="scikit-image's stopping rule; 2e-4 is its default")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--art", type=Path, default=REPOSITORY / "build" / "oracle" / "bin" / "python")
    parser.add_argument("--art-images", type=int, default=1, help="0 leaves ART out")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    images = photographs(args.images, args.batch)
    found: dict[str, Any] = {"batch": len(images), "side": SIDE, "weight": args.weight, "torch": torch.__version__}
    found["equal_objective"], found["masked"], found["art"] = [], [], []
    threads = [int(number) for number in args.threads.split(",")]
    for eps in (float(eps) for eps in args.eps.split(",")):
        theirs, tolerance, objectives = matched(images, args.weight, eps)
        for number in threads:
            row = {"eps": eps, "threads": number, **objectives}
            row |= raced(images, args.weight, theirs, tolerance, number, args.rounds)
            found["equal_objective"].append(row)
            print(
                f"scikit-image eps {eps:g}, {number} thread(s): scikit-image {row['theirs_ms']:.1f} ms, ours "
                f"{row['ours_ms']:.1f} ms per image, ratio {row['ratio']:.2f} (rounds {row['ratios']}); our objective "
                f"is lower by {row['lower_mean']:.1e} on average and by {row['lower_least']:.1e} at least",
                flush=True,
            )
    for number in threads:
        row = {"threads": number, "ours_ms": masked(images, args.weight, number)}
        print(f"our masked problem, {number} thread(s): {row['ours_ms']:.0f} ms per image to a gap of 1e-3", flush=True)
        found["masked"].append(row)
    for iterations in (10, 100) if args.art.is_file() and args.art_images else ():
        for number in threads:
            row = against_art(images[: args.art_images], args.art, number, iterations)
            found["art"].append(row)
            print(
                f"ART, {iterations} iterations, {number} thread(s): {row['art_seconds']:.2f} s, at equal objective "
                f"ours {row['ours_ms']:.1f} ms per image ({row['ours_iterations']} iterations), "
                f"{row['times_faster']:.1f} times as fast",
                flush=True,
            )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def photographs(folder: Path, count: int) -> Tensor:
    """The middle of ``count`` pictures spread over the folder: N x 3 x 224 x 224."""
    # Not Path.rglob, which does not follow links to folders.
    names = (name for name in glob.glob(str(folder / "**" / "*"), recursive=True))
    files = sorted(name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))
    if not files:
        raise SystemExit(f"no pictures in {folder}: name a folder with --images")
    out = []
    for path in files[:: max(1, len(files) // count)][:count]:
        picture = Image.open(path).convert("RGB")
        scale = 256 / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
        out.append(np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


def chambolle(weight: float, eps: float) -> Callable[[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """scikit-image's solver for a list of images H x W x 3."""
    return lambda images: [
        denoise_tv_chambolle(one, weight=weight, eps=eps, max_num_iter=20_000, channel_axis=-1) for one in images
    ]


def matched(images: Tensor, weight: float, eps: float) -> tuple[Any, Tensor, dict[str, float]]:
    """scikit-image's solver, and for each image the loosest tolerance at which ours ends no higher."""
    problem = TvProblem(images, None, weight, "isotropic", "squared")
    theirs = chambolle(weight, eps)
    flat = images.permute(0, 2, 3, 1).contiguous().numpy()
    target = problem.objective(torch.from_numpy(np.stack(theirs(flat))).permute(0, 3, 1, 2).contiguous())
    best, lower = loosest(problem, target)
    return theirs, best, {"lower_mean": float(lower.mean()), "lower_least": float(lower.min())}


def loosest(problem: TvProblem, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loosest tolerance at which each objective is no higher than the target, and by what share it is lower."""
    best = torch.full_like(target, TOLERANCES[-1])
    objective, open_still = torch.full_like(best, torch.inf), torch.ones(len(best), dtype=torch.bool)
    for tolerance in TOLERANCES:
        # Measured at the images that come out, not at what the solver says.
        found = minimize_total_variation(problem.images, problem.weight, tolerance=tolerance)
        ours = problem.objective(found.images)
        hit = open_still & (ours <= target)
        best[hit], objective[hit] = tolerance, ours[hit]
        open_still &= ~hit
        if not bool(open_still.any()):
            return best, 1 - objective / target
    raise SystemExit("our objective stays above theirs: add tighter tolerances")


def raced(images: Tensor, weight: float, theirs: Any, tolerance: Tensor, threads: int, rounds: int) -> dict[str, Any]:
    """Both in turns: medians, per image."""
    flat = images.permute(0, 2, 3, 1).contiguous().numpy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    sides = {
        "theirs": lambda: theirs(flat),
        "ours": lambda: minimize_total_variation(images, weight, tolerance=tolerance),
    }
    sides["ours"]()
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for round_ in range(rounds):
        for name in list(sides)[:: 1 if round_ % 2 else -1]:
            begun = clock(threads)
            sides[name]()
            times[name].append((clock(threads) - begun) / len(images) * 1e3)
    torch.set_num_threads(before)
    ratios = [ours / other for ours, other in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "theirs_ms": statistics.median(times["theirs"]),
        "ours_ms": statistics.median(times["ours"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }


def clock(threads: int) -> float:
    """Processor time for one thread, which other work on the machine disturbs less; wall time for more."""
    return time.process_time() if threads == 1 else time.perf_counter()


def masked(images: Tensor, weight: float, threads: int) -> float:
    """Our milliseconds per image for the masked problem that the defence solves, to a gap of 1e-3."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep = torch.rand(len(images), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < 0.5
    begun = clock(threads)
    minimize_total_variation(images, weight, keep=keep, tolerance=1e-3)
    seconds = clock(threads) - begun
    torch.set_num_threads(before)
    return 1e3 * seconds / len(images)


def against_art(images: Tensor, python: Path, threads: int, iterations: int) -> dict[str, Any]:
    """ART's time in its own environment, and ours for the same problems at an objective that is no higher."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npz"
        np.savez(file, images=images.permute(0, 2, 3, 1).numpy())
        command = [str(python), "-c", IN_ART, str(file), str(threads), str(iterations)]
        subprocess.run(command, capture_output=True, check=True)
        with np.load(file) as said:
            theirs, keep, seconds = said["images"], said["keep"], float(said["seconds"])

    def channels(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).permute(0, 3, 1, 2).reshape(-1, 1, SIDE, SIDE).contiguous()

    x, mask = images.reshape(-1, 1, SIDE, SIDE), channels(keep)
    problem = TvProblem(x, mask.float(), ART_WEIGHT, "lines", "norm")
    target = problem.objective(channels(theirs))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for most in range(2, 3000):
        # Far from the minimum, where ART stops, there is no proved gap to stop at.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            begun = clock(threads)
            found = minimize_total_variation(
                x, ART_WEIGHT, keep=mask, kind="lines", data="norm", tolerance=1e-6, max_iterations=most
            )
            ours = (clock(threads) - begun) / len(images)
        lower = 1 - problem.objective(found.images) / target
        if float(lower.min()) >= 0:
            break
    torch.set_num_threads(before)
    return {
        "threads": threads,
        "art_iterations": iterations,
        "art_seconds": seconds,
        "ours_ms": 1e3 * ours,
        "ours_iterations": most,
        "times_faster": seconds / ours,
        "lower_least": float(lower.min()),
    }


if __name__ == "__main__":
    main()
