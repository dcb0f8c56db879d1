"""The faces of packages whose public names are imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importing(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package has for its ``__getattr__`` (PEP 562): each name comes from the module that ``homes`` gives.

    Args:
        package: the package's own name.
        homes: for each public name the module that holds it; where it is the name in the package itself, that module
            is what the name stands for.

    Raises:
        AttributeError: by the function that is returned, for a name that the package does not have.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(home)
        return module if home == f"{package}.{name}" else getattr(module, name)

    return get
