"""From a recipe to the trainings that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.experiments.recipe import TEACHER, ExperimentRecipe, Method, Threat


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: how.
        threat: what the training attacks with; None where it does not attack.
        labels: number of labelled images; 0 for all.
        seed: of weights, order, labelled images and attacks.
    """

    method: Method
    threat: Threat | None
    labels: int
    seed: int

    @property
    def name(self) -> str:
        """Names the run, and its folder."""
        threat = [] if self.threat is None else [self.threat.name]
        labels = [f"n{self.labels}"] if self.labels else []
        return "-".join([self.method.name.replace(" ", "-"), *threat, *labels, f"seed{self.seed}"])

    @property
    def teacher(self) -> str | None:
        """The name of the run whose net gives the pseudo-labels, for a method that needs some."""
        if not self.method.unlabelled:
            return None
        return Run(Method(TEACHER, "standard"), None, self.labels, self.seed).name


def runs_of(recipe: ExperimentRecipe) -> list[Run]:
    """All runs of a recipe, every teacher before its pupils."""
    methods = sorted(recipe.methods, key=lambda method: method.name != TEACHER)
    return [
        Run(method, threat, labels, seed)
        for labels in recipe.labels
        for seed in range(recipe.seeds)
        for method in methods
        for threat in (recipe.threats if method.attacks else (None,))
    ]


def threats_of(recipe: ExperimentRecipe, run: Run) -> tuple[Threat, ...]:
    """What a run's net is measured under: what it was trained for, or everything."""
    return recipe.threats if run.threat is None else (run.threat,)
