"""A user's own Python code: ``python:FILE_OR_MODULE:NAME`` is the function of that name, for whatever asks for one."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from nndefense.errors import InputError, NNDefenseError, one_line

PYTHON = "python:"


def own_function(
    source: str, *, returns: str, call: str, error: type[NNDefenseError] = InputError
) -> Callable[..., Any]:
    """Run the code that ``python:FILE_OR_MODULE:NAME`` names, and return its function NAME.

    While FILE runs, and again whenever the function does, its folder comes first among the places of imports;
    afterwards nothing of that is left, so that two files may each have a helper of the same name beside them.

    Args:
        source: what the user wrote.
        returns: what the function is to return, for the errors: ``"the net"``.
        call: how it is called, for the errors: ``"without arguments"``.
        error: the kind of the errors.

    Returns:
        The function. What it raises becomes one line of that kind; the project's own errors pass as they are.

    Raises:
        NNDefenseError: of the kind ``error``: the code cannot be found or run, or has no such function.
    """
    target, name, path = _parts(source, error)
    kept: dict[str, ModuleType] = {}
    try:
        with _imports_beside(path, kept):
            module = _run_file(path) if path else importlib.import_module(target)
    except (Exception, SystemExit) as raised:
        if isinstance(raised, ModuleNotFoundError) and not path and raised.name == target.partition(".")[0]:
            raise error(f"there is no Python module {target}: install it, or give a file's path") from None
        raise error(f"{target} could not be imported ({type(raised).__name__}: {one_line(raised)})") from raised
    function = getattr(module, name, None)
    if not callable(function):
        raise error(f"{target} has no function {name}: name one that returns {returns}")

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        with _imports_beside(path, kept):
            try:
                return function(*given, **named)
            except NNDefenseError:
                raise
            except (Exception, SystemExit) as raised:
                raise error(
                    f"{name} in {target} raised {type(raised).__name__}: {one_line(raised)}; "
                    f"it must run {call} and return {returns}"
                ) from raised

    return called


def sha256_of_source(source: str, *, error: type[NNDefenseError] = InputError) -> str:
    """The sha256 of the file that ``python:FILE_OR_MODULE:NAME`` names, which tells its versions apart.

    Modules beside the file that it imports, or that they import, count too; installed packages do not.

    Raises:
        NNDefenseError: of the kind ``error``: there is no such file.
    """
    target, _, path = _parts(source, error)
    if path is None:
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(target)
            path = Path(found.origin) if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise error(f"there is no file of Python code for {source}: give a file's path")
    digest = hashlib.sha256()
    for file in _with_imported(path):
        digest.update(f"{file.relative_to(path.parent).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _with_imported(path: Path) -> list[Path]:
    """A file, and the files beside it that it imports at whatever depth, in the order of their names."""
    found, waiting = set[Path](), [path]
    while waiting:
        file = waiting.pop()
        found.add(file)
        # What is no Python says so when it is run.
        with contextlib.suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(file.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for top in {name.partition(".")[0] for name in names} - {""}:
                    beside = [path.parent / f"{top}.py", *(path.parent / top).rglob("*.py")]
                    waiting += [one for one in beside if one.is_file() and one not in found]
    return sorted(found)


def sha256_of_function(function: Callable[..., Any], also: object = ()) -> str:
    """The sha256 of a function: of its file, or of its code where it stands in none, and of what it closes over.

    Args:
        function: the user's.
        also: what else tells it from another, as plain values.

    Values without a text of their own (most objects) make it another function in every process: rather measured
    again than mistaken.
    """
    digest = hashlib.sha256(repr(also).encode())
    with contextlib.suppress(OSError, TypeError):
        digest.update(Path(inspect.getsourcefile(function) or "").read_bytes())
    digest.update(b"" if inspect.isfunction(function) else repr(function).encode())
    _update_with_code(digest, function)
    return digest.hexdigest()


def _update_with_code(digest: hashlib._Hash, function: Any, seen: tuple[Any, ...] = ()) -> None:
    """Feed a function's code, constants, defaults and closure to a hash."""
    if not inspect.isfunction(function) or function in seen:
        return
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
        plain = [one for one in code.co_consts if not isinstance(one, CodeType)]
        digest.update(code.co_code + repr((plain, code.co_names)).encode())
    held = inspect.getclosurevars(function).nonlocals.values()
    for value in [*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]:
        _update_with_code(digest, value, (*seen, function))
        digest.update(b"" if inspect.isfunction(value) else repr(value).encode())


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """While a user's own code runs: what it raises becomes one line that begins with ``what``, an InputError; the
    project's own errors pass as they are.
    """
    try:
        yield
    except NNDefenseError:
        raise
    except Exception as raised:
        raise InputError(f"{what} raised {type(raised).__name__}: {one_line(raised)}") from raised


def taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named arguments that a function takes."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def check_allowed(values: Any, path: Path, *, allow_code: bool) -> None:
    """Raise :class:`InputError` where a file's values name Python code, which would be run, and that is not allowed.

    A file may be a stranger's; what the user names himself runs without asking.
    """
    if not allow_code and (named := sorted({*_code_in(values)})):
        raise InputError(
            f"{path} names Python code ({', '.join(named)}), which would be run: give --allow-code once you have read "
            "that code and trust it"
        )


def _code_in(value: Any) -> Iterator[str]:
    """The Python code that values name, in keys, lists and tables at whatever depth."""
    if isinstance(value, str) and value.strip().lower().startswith(PYTHON):
        yield value
    elif isinstance(value, Mapping):
        yield from _code_in([*value, *value.values()])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _code_in(one)


def _parts(source: str, error: type[NNDefenseError]) -> tuple[str, str, Path | None]:
    """File or module as it was written, the function's name, and the file's path, or None for a module."""
    target, _, name = source.removeprefix(PYTHON).rpartition(":")
    if not target or not name:
        raise error(f"{source} is not complete: write python:FILE:NAME, such as python:mine.py:build")
    if not (target.endswith(".py") or os.sep in target or "/" in target or Path(target).is_file()):
        return target, name, None
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise error(f"there is no file {target}: check the path before the last colon")
    return target, name, path


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module under a name that no other module has."""
    name = f"_nndefense_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def _imports_beside(path: Path | None, kept: dict[str, ModuleType]) -> Iterator[None]:
    """Let imports find the modules beside ``path``, and forget those modules afterwards: ``kept`` holds them meanwhile.

    Otherwise the ``utils`` beside a second file would silently be the one beside the first.
    """
    if path is None:
        yield
        return
    folder = path.parent
    before = set(sys.modules)
    packages = {name.partition(".")[0] for name in before}
    sys.modules.update({name: module for name, module in kept.items() if name not in before})
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            file = getattr(sys.modules.get(top), "__file__", None)
            # Only what the folder itself offers: an environment of installed packages may lie further down in it.
            if top not in packages and file and Path(file) in (folder / f"{top}.py", folder / top / "__init__.py"):
                for part in [part for part in sys.modules if part == top or part.startswith(f"{top}.")]:
                    kept[part] = sys.modules.pop(part)
