"""Recipes: TOML files that become frozen dataclasses, read and checked by the types of the dataclasses' fields."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nndefense.errors import DataError, InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")
_NAMES = {str: "text", bool: "true or false", int: "a whole number"}
_NUMBER = 'a number or a quotient such as "8/255"'


def at(place: str, read: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The ``metadata`` of a field whose entry does not stand under the field's name, or is not read by its type.

    Args:
        place: the entry, after the name of its table and a point where it stands in one: ``data.limit``.
        read: makes the field's value of the entry; without it the field's type says how.
    """
    return {"place": place, "read": read}


def build(
    kind: type[_T],
    values: Any,
    place: str = "",
    *,
    given: Mapping[str, Any] | None = None,
    needed: Collection[str] = (),
) -> _T:
    """Make a dataclass of a table.

    Text, whole numbers, numbers and truth values stand for themselves; a number may be a quotient such as ``"8/255"``;
    of a tuple there is a list, or its only value; of a dataclass a table; of a mapping any table.

    Args:
        kind: the dataclass.
        values: the table.
        place: its name, which errors put before the entry's.
        given: values of fields that the table must not have.
        needed: fields that the table must have though they have a default.

    Raises:
        InputError: an entry is missing, unknown, of the wrong kind or out of range; the message names it.
    """
    given = given or {}
    found = {**given, **entries(kind, values, place, leave=given)}
    lacking = [
        _join(place, _place(entry)) for entry in fields(cast(Any, kind))
        if entry.name not in found
        and (entry.name in needed or (entry.default is MISSING and entry.default_factory is MISSING))
    ]  # fmt: skip
    if lacking:
        raise InputError(f"a recipe needs {', '.join(lacking)}")
    return kind(**found)


def entries(kind: type, values: Any, place: str = "", *, leave: Collection[str] = ()) -> dict[str, Any]:
    """The checked values of a table by the names of a dataclass's fields; fields in ``leave`` have no entry."""
    known = {_place(entry): entry for entry in fields(kind) if entry.name not in leave}
    sections = {name.partition(".")[0] for name in known if "." in name}
    flat: dict[str, Any] = {}
    for name, value in table(values, place).items():
        if name in sections:
            flat.update({f"{name}.{inner}": one for inner, one in table(value, _join(place, name)).items()})
        else:
            flat[name] = value
    if unknown := [_join(place, name) for name in flat if name not in known]:
        raise InputError(f"a recipe has no entry {', '.join(unknown)}: choose from {', '.join(known)}")
    hints = get_type_hints(kind)
    found = {}
    for name, value in flat.items():
        read = known[name].metadata.get("read")
        field = known[name].name
        found[field] = read(value) if read else converted(hints[field], value, _join(place, name))
    return found


def converted(kind: Any, value: Any, place: str) -> Any:
    """A value of TOML as one of a type.

    Raises:
        InputError: it is of another kind; the message names the place.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return (
            None if value is None else converted(next(part for part in parts if part is not type(None)), value, place)
        )
    if origin is Literal:
        if value not in parts:
            raise InputError(f"{place} is {value!r}, but must be one of {', '.join(parts)}")
        return value
    if origin is tuple:
        return _tuple(parts, value, place)
    if is_dataclass(kind):
        return build(cast(type, kind), value, place)
    if kind is float:
        return number(value, place)
    if kind in _NAMES:
        # A boolean is an integer to Python, but not to people.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{place} is {value!r}, but must be {_NAMES[kind]}")
        return value
    return table(value, place)


def _tuple(parts: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        if is_dataclass(parts[0]):
            raise InputError(f"{place} must be written as [[{place}]] tables")
        value = [value]
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
    if len(kinds) != len(value):
        raise InputError(f"{place} is {value!r}, but must be a list of {len(kinds)}")
    return tuple(converted(kind, one, place) for kind, one in zip(kinds, value, strict=True))


def tables(values: Any, place: str) -> list[dict[str, Any]]:
    """The tables of an array of tables, ``[[place]]``."""
    if not isinstance(values, list) or not all(isinstance(one, Mapping) for one in values):
        raise InputError(f"{place} must be written as [[{place}]] tables")
    return [dict(one) for one in values]


def table(values: Any, place: str) -> dict[str, Any]:
    """A table as a dict."""
    if not isinstance(values, Mapping):
        raise InputError(f"{place or 'a recipe'} is {values!r}, but must be a table")
    return dict(values)


def number(value: Any, place: str) -> float:
    """A number, or a quotient such as ``"8/255"``."""
    top, slash, bottom = value.partition("/") if isinstance(value, str) else (value, "", "")
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(top) / (float(bottom) if slash else 1.0)
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(f"{place} is {value!r}, but must be {_NUMBER}") from None


def _place(entry: Field[Any]) -> str:
    return str(entry.metadata.get("place", entry.name))


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        DataError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no recipe at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: give a TOML file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is no TOML ({error})") from error


def shipped(package: str) -> tuple[str, ...]:
    """The names of the recipes in the folder ``recipes`` of a package, in alphabetical order."""
    folder = resources.files(package).joinpath("recipes")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def read_shipped(package: str, name: str, what: str = "recipe") -> dict[str, Any]:
    """The values of a recipe that comes with a package; ``what`` it is to people.

    Raises:
        InputError: there is none of that name.
    """
    if name not in shipped(package):
        raise InputError(f"there is no {what} {name!r}: choose one of {', '.join(shipped(package))}")
    return tomllib.loads(resources.files(package).joinpath("recipes").joinpath(f"{name}.toml").read_text("utf-8"))


def identity(plain: Any) -> str:
    """Identifies a recipe: the sha256 of its plain values in canonical form."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
