"""How commands declare their options: records of options that many share, choices, lists, and groups of commands.

A command is one function with keyword parameters, of which some may be records: frozen dataclasses whose fields are
options. Typer is shown a function that has an option for every field; the command gets the record.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from nndefense.errors import InputError
from nndefense.own_code import PYTHON

# The table of options needs so many columns: below, it would cut off long words, and defaults with them.
_TABLE = 110
# Stands for a hyphen that no line may end at.
_WHOLE = "\0"

Command = TypeVar("Command", bound=Callable[..., None])


class Only:
    """Beside a record: the fields that the command offers; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class OneOf:
    """In the place of ``typer.Option``: a text option that takes one of some words, or a list of them.

    Attributes:
        help: of the option, whose flag is the parameter's name.
        words: that can be chosen, or what gives them. It is asked each time the command is made, so that whatever was
            registered until then is among them.
        python: whether ``python:FILE:NAME`` is taken, too.
    """

    help: str
    words: Sequence[str] | Callable[[], Sequence[str]]
    python: bool = False

    def option(self) -> Any:
        """What Typer declares."""
        words = [*(self.words() if callable(self.words) else self.words)]
        shown = [*words, f"{PYTHON}FILE:NAME"] if self.python else words

        def check(value: str | list[str] | None) -> str | list[str] | None:
            for word in [value] if isinstance(value, str) else value or ():
                if word not in words and not (self.python and word.startswith(PYTHON)):
                    raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, shown))}.")
            return value

        # A long list is read in the help, where lines break between its words.
        few = len(shown) <= 6
        text = self.help if few else f"{self.help} One of {', '.join(shown)}."
        metavar = "|".join(shown) if few else "NAME"
        return typer.Option(help=text, metavar=metavar, callback=check, autocompletion=lambda: words)


@dataclass(frozen=True)
class Commas:
    """In the place of ``typer.Option``: a list with commas, which may be given several times; the command gets one."""

    help: str

    def option(self) -> Any:
        """What Typer declares."""
        return typer.Option(help=self.help, metavar="A,B,...")


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """The function as Typer takes it: with one option for every field of its records.

    A default of a record's parameter stands before those of its fields. Options without a default come first. Paths get
    their ``~`` expanded.
    """
    offered: list[Parameter] = []
    records: list[tuple[str, Any, list[str]]] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        hint, *extras = get_args(parameter.annotation) if _annotated(parameter.annotation) else [parameter.annotation]
        if not is_dataclass(hint):
            offered.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        only = next((extra.names for extra in extras if isinstance(extra, Only)), None)
        hints = get_type_hints(hint, include_extras=True)
        chosen = [field for field in fields(hint) if only is None or field.name in only]
        for field in chosen:
            default = Parameter.empty if field.default is MISSING else field.default
            if parameter.default is not Parameter.empty:
                default = getattr(parameter.default, field.name)
            offered.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]))
        records.append((parameter.name, hint, [field.name for field in chosen]))
    joined = {p.name: p.default for p in offered if _has(p, Commas)}

    @functools.wraps(function)
    def command(**values: Any) -> None:
        values = {name: _from_home(value) for name, value in values.items()}
        for name, default in joined.items():
            values[name] = ",".join(values[name]) if values[name] else default
        for name, record, taken in records:
            values[name] = record(**{field: values.pop(field) for field in taken})
        function(**values)

    del command.__wrapped__
    shown = sorted(map(_typed, offered), key=lambda parameter: parameter.default is not Parameter.empty)
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return command


def _from_home(value: Any) -> Any:
    """A path, or several, with the home folder for ``~``, which a shell leaves as it is in ``--out=~/x``."""
    if isinstance(value, list | tuple):
        return type(value)(map(_from_home, value))
    if not isinstance(value, Path):
        return value
    found = Path(os.path.expanduser(value))
    if (user := found.parts[:1]) and user[0].startswith("~"):
        raise InputError(f"{value} begins with the home folder of a user who is not known here: write the whole path")
    return found


def _annotated(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated


def _has(parameter: Parameter, kind: type) -> bool:
    return _annotated(parameter.annotation) and any(isinstance(x, kind) for x in get_args(parameter.annotation)[1:])


def _typed(parameter: Parameter) -> Parameter:
    """A parameter with Typer's own declaration in the place of ours."""
    if not _annotated(parameter.annotation):
        return parameter
    own = next((extra for extra in get_args(parameter.annotation) if isinstance(extra, OneOf | Commas)), None)
    if own is None:
        return parameter
    several = any(get_origin(part) is list for part in get_args(get_args(parameter.annotation)[0]))
    hint: Any = list[str] | None if several else str | None
    default = parameter.default
    if isinstance(own, Commas):
        hint, default = list[str] | None, [default] if isinstance(default, str) else default
    return parameter.replace(annotation=Annotated[hint, own.option()], default=default)


class Helpful(TyperCommand):
    """A command whose help is a table of options, and a plain list where the console is too narrow for that."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        if shutil.get_terminal_size().columns >= _TABLE:
            super().format_help(ctx, formatter)
            return
        self.rich_markup_mode = None
        listed = formatter.write_dl
        # A name such as rank-margin is found, and copied, in one piece only.
        formatter.write_dl = lambda rows, *args, **options: listed(
            [(name, text.replace("-", _WHOLE)) for name, text in rows], *args, **options
        )
        super().format_help(ctx, formatter)
        formatter.buffer = [part.replace(_WHOLE, "-") for part in formatter.buffer]


class Group:
    """Commands under one name, such as ``nndefense index build``."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self.commands: list[tuple[str, Callable[..., None], str | None]] = []

    def command(self, name: str, help: str | None = None) -> Callable[[Command], Command]:
        """Add the function below under this name; its docstring is the help, unless one is given."""

        def add(function: Command) -> Command:
            self.commands.append((name, function, help))
            return function

        return add

    def typer(self) -> typer.Typer:
        """The group as Typer takes it."""
        made = typer.Typer(no_args_is_help=True, help=self.help)
        for name, function, text in self.commands:
            made.command(name, cls=Helpful, help=text)(spread(function))
        return made
