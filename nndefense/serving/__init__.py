"""Defended predictions to rely on: the guard as a Python call, and its HTTP service.

The guard needs nothing but the package itself; the service (``create_app``) needs the extra ``serve``, and is imported
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nndefense.serving.defended import Defended, Neighbor, Opinion
from nndefense.serving.guard import Guard
from nndefense.serving.percentile import Percentile
from nndefense.serving.pictures import Sample

if TYPE_CHECKING:
    from nndefense.serving.app import create_app
    from nndefense.serving.client import Client
    from nndefense.serving.settings import ServingSettings

_HOMES = {
    "Client": "nndefense.serving.client",
    "ServingSettings": "nndefense.serving.settings",
    "create_app": "nndefense.serving.app",
}

__all__ = [
    "Client",
    "Defended",
    "Guard",
    "Neighbor",
    "Opinion",
    "Percentile",
    "Sample",
    "ServingSettings",
    "create_app",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nndefense.serving' has no attribute {name!r}")
