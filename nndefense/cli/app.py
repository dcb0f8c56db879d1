"""The command's subcommands in their groups; each imports its work when it is called, so that help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from nndefense import __version__
from nndefense.cli.attack import attack
from nndefense.cli.calibrate import calibrate
from nndefense.cli.certify import certify
from nndefense.cli.classify import classify
from nndefense.cli.declare import Group, Helpful, Only, spread
from nndefense.cli.demo import demo
from nndefense.cli.evaluate import evaluate
from nndefense.cli.guard import guard
from nndefense.cli.options import Common

# With its commands for patches.
from nndefense.cli.patches import index
from nndefense.cli.pseudo_label import pseudo_label
from nndefense.cli.racnn import racnn
from nndefense.cli.reproduce import reproduce
from nndefense.cli.rp2 import rp2
from nndefense.cli.serve import serve
from nndefense.cli.theory import theory
from nndefense.cli.train import train

_COMMANDS = {
    "Use it": (demo, index, calibrate, classify, guard, serve),
    "Measure": (evaluate, certify, attack, rp2, reproduce),
    "Train": (train, pseudo_label, racnn),
    "Learn": (theory,),
}


def build() -> typer.Typer:
    """The whole command; the choices of its options are those that are registered now."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Rich's own markup would leave out whatever stands in square brackets.
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="The nearest-neighbour defence against adversarial images: build, calibrate, attack, defend, report.",
        epilog="Exit codes: 0 done, 1 other error, 2 wrong input, 3 data, 4 classifier, 5 database, 130 interrupted.",
    )
    app.callback()(spread(_main))
    for panel, commands in _COMMANDS.items():
        for command in commands:
            if isinstance(command, Group):
                app.add_typer(command.typer(), name=command.name, rich_help_panel=panel)
            else:
                app.command(cls=Helpful, rich_help_panel=panel)(spread(command))
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"nndefense {__version__}")
        raise typer.Exit


def _main(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    common: Annotated[Common, Only("debug")],
) -> None:
    """--debug is read where errors are caught; here it is only declared."""
