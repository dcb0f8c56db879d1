"""Attacks on defences that retrieve: they know tensors and callables, gathered in a :class:`RetrievalSurface`."""

from nndefense.attacks.retrieval.ensemble import AdaptiveResult, adaptive, run_adaptive
from nndefense.attacks.retrieval.exact import ExactResult, check_exact, run_exact
from nndefense.attacks.retrieval.minimum import push_pull_minimum
from nndefense.attacks.retrieval.objectives import (
    class_scores,
    feature_drift,
    gray,
    pgd_fs,
    pgd_pr,
    push_pull,
    soft_top_k,
    straight_through,
)
from nndefense.attacks.retrieval.ranks import rank_margin
from nndefense.attacks.retrieval.surface import Counts, Knowledge, Nearest, Rejection, RetrievalSurface, Rows

__all__ = [
    "AdaptiveResult", "Counts", "ExactResult", "Knowledge", "Nearest", "Rejection", "RetrievalSurface", "Rows",
    "adaptive", "check_exact", "class_scores", "feature_drift", "gray", "pgd_fs", "pgd_pr", "push_pull",
    "push_pull_minimum", "rank_margin", "run_adaptive", "run_exact", "soft_top_k", "straight_through",
]  # fmt: skip
