"""Published experiments, each as a recipe that trains, attacks, and writes the table and the figure.

A recipe is a TOML file in ``recipes`` with two scales: ``full``, the settings of the papers for a GPU, and ``small``,
for two CPU cores. Nothing is chosen on test images: validation images are split off the training set.
"""

from nndefense.experiments.data import Images, open_images
from nndefense.experiments.figures import figure_of
from nndefense.experiments.published import Published
from nndefense.experiments.recipe import (
    SCALES,
    ExperimentRecipe,
    Method,
    recipe_from,
    recipe_names,
    shipped_recipe,
)
from nndefense.experiments.report import tables_of, write_outputs
from nndefense.experiments.runner import read_results, run
from nndefense.experiments.spread import Spread, differences
from nndefense.experiments.threat import Threat
from nndefense.experiments.train import Run, runs_of

__all__ = [
    "SCALES",
    "ExperimentRecipe",
    "Images",
    "Method",
    "Published",
    "Run",
    "Spread",
    "Threat",
    "differences",
    "figure_of",
    "open_images",
    "read_results",
    "recipe_from",
    "recipe_names",
    "run",
    "runs_of",
    "shipped_recipe",
    "tables_of",
    "write_outputs",
]
