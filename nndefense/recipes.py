"""Recipes: TOML files that become frozen dataclasses, read and checked by the types of the dataclasses' fields."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nndefense.errors import DataError, InputError
from nndefense.files import read_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")
# The memory for a dotted name grows with the square of its parts.
_MOST_BYTES, _MOST_POINTS = 1 << 18, 1000
_KINDS = {str: "text", bool: "true or false", int: "a whole number"}


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
    table: str = "",
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
        table: its name, which errors put before the entry's.
        given: values of fields that the table must not have.
        needed: fields that the table must have though they have a default.

    Raises:
        InputError: an entry is missing, unknown, of the wrong kind or out of range; the message names it.
    """
    found = {**(given or {}), **entries(kind, values, table, leave=given or ())}
    lacking = [
        _path(table, _place(entry)) for entry in fields(cast(Any, kind))
        if entry.name not in found
        and (entry.name in needed or (entry.default is MISSING and entry.default_factory is MISSING))
    ]  # fmt: skip
    if lacking:
        raise InputError(f"a recipe needs {', '.join(lacking)}")
    return kind(**found)


def entries(kind: type, values: Any, table: str = "", *, leave: Collection[str] = ()) -> dict[str, Any]:
    """The checked values of a table by the names of a dataclass's fields; fields in ``leave`` have no entry."""
    known = {_place(entry): entry for entry in fields(kind) if entry.name not in leave}
    sections = {name.partition(".")[0] for name in known if "." in name}
    flat: dict[str, Any] = {}
    top = mapping(values, table)
    # A point leads into a table; in a name it can only stand quoted, and would be taken for that table's entry.
    if quoted := [_path(table, f'"{name}"') for name in top if "." in name]:
        raise InputError(f"a recipe has no entry {', '.join(quoted)}: write it in its table, without quotes")
    for name, value in top.items():
        inner = mapping(value, _path(table, name)) if name in sections else None
        flat.update({name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()})
    if unknown := [_path(table, name) for name in flat if name not in known]:
        raise InputError(f"a recipe has no entry {', '.join(unknown)}: choose from {', '.join(known)}")
    hints = get_type_hints(kind)
    found = {}
    for name, value in flat.items():
        field, read = known[name].name, known[name].metadata.get("read")
        found[field] = read(value) if read else converted(hints[field], value, _path(table, name))
    return found


def converted(kind: Any, value: Any, place: str) -> Any:
    """A value of TOML as one of a type.

    Raises:
        InputError: it is of another kind; the message names the place.
    """
    origin, parts = get_origin(kind), get_args(kind)
    wanted = None
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in parts if part is not type(None))
        return None if value is None else converted(inner, value, place)
    if origin is tuple:
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        inner_kinds = [parts[0]] * len(listed) if parts[-1] is Ellipsis else parts
        if len(inner_kinds) == len(listed):
            return tuple(converted(inner, one, place) for inner, one in zip(inner_kinds, listed, strict=True))
        wanted = f"a list of {len(inner_kinds)}"
    elif is_dataclass(kind):
        return build(cast(type, kind), value, place)
    elif kind is float:
        return number(value, place)
    elif origin is Literal:
        wanted = None if value in parts else f"one of {', '.join(parts)}"
    elif kind not in _KINDS:
        return mapping(value, place)
    # A boolean is an integer to Python, but not to people.
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = _KINDS[kind]
    if wanted:
        raise InputError(f"{place} is {value!r}, but must be {wanted}")
    return value


def options_of(
    functions: Sequence[Callable[..., Any]], given: Any, whose: str, leave: Collection[str]
) -> dict[str, Any]:
    """The options that a table gives to a function, checked by the names and types of its arguments.

    Args:
        functions: the function, and those that it passes options on to.
        given: the table.
        whose: the options are, for the message.
        leave: arguments of the first that are no options.

    Raises:
        InputError: there is no such option, or the value is of another kind.
    """
    kinds: dict[str, Any] = {}
    anything = False
    for function in functions:
        made = vars(function)["__init__"] if isinstance(function, type) else function
        parameters = inspect.signature(made).parameters.values()
        # Annotations of a user's function may name what is imported for type checkers alone.
        try:
            hints = get_type_hints(made)
        except NameError:
            hints = {}
        anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
        # What must be given in its place is no option.
        named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY or one.default is not one.empty]
        kinds |= {name: hints.get(name) for name in named if function is not functions[0] or name not in leave}
    values = mapping(given, f"options of {whose}")
    if not anything and (unknown := [name for name in values if name not in kinds]):
        raise InputError(f"{whose} has no option {', '.join(unknown)}: it takes {', '.join(kinds) or 'none'}")
    # Other types than TOML's are checked where they are used.
    return {
        name: converted(kinds[name], value, f"{name} of {whose}") if _is_plain(kinds.get(name)) else value
        for name, value in values.items()
    }


def _is_plain(kind: Any) -> bool:
    """Whether a type is text, a number or a truth value, or one of these or None."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    return kind in (*_KINDS, float) or (len(parts) == 1 and len(get_args(kind)) == 2 and parts[0] in (*_KINDS, float))


def mapping(value: Any, place: str) -> dict[str, Any]:
    """A table as a dict."""
    if not isinstance(value, Mapping):
        raise InputError(f"{place or 'a recipe'} is {value!r}, but must be a table")
    return dict(value)


def mappings(values: Any, place: str) -> list[dict[str, Any]]:
    """The tables of an array of tables, ``[[place]]``."""
    if not isinstance(values, list):
        raise InputError(f"{place} is {values!r}, but must be written as [[{place}]] tables")
    return [mapping(one, f"[[{place}]]") for one in values]


def number(value: Any, place: str) -> float:
    """A number, or a quotient such as ``"8/255"``."""
    top, slash, bottom = value.partition("/") if isinstance(value, str) else (value, "", "")
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(top) / (float(bottom) if slash else 1.0)
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(f'{place} is {value!r}, but must be a number or a quotient such as "8/255"') from None


def check_least(recipe: Any, least: int, *names: str) -> None:
    """Raise :class:`InputError` for a field of one of these names that is below ``least``; None is no number."""
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}")


def _place(entry: Field[Any]) -> str:
    return str(entry.metadata.get("place", entry.name))


def _path(table: str, name: str) -> str:
    return f"{table}.{name}" if table else name


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        DataError: the file is missing or no TOML.
    """
    try:
        text = read_whole(path, _MOST_BYTES).decode("utf-8")
        if any(line.count(".") > _MOST_POINTS for line in text.splitlines()):
            raise DataError(f"{path} has a line with more than {_MOST_POINTS:,} points: give a recipe")
        return tomllib.loads(text)
    except FileNotFoundError as error:
        raise DataError(f"there is no recipe at {path}") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise DataError(f"{path} cannot be read{reason}: give a TOML file in UTF-8") from error
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
