"""The HTTP service of the guard (``create_app``), its settings and its client; it needs the extra ``serve``.

The names are imported when they are first used, since the client needs none of the service's packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.serving.app import create_app
    from nndefense.serving.client import Client, ServiceError
    from nndefense.serving.http.settings import ServingSettings

__getattr__ = importing(
    __name__,
    {
        "Client": "nndefense.serving.client",
        "ServiceError": "nndefense.serving.client",
        "ServingSettings": "nndefense.serving.http.settings",
        "create_app": "nndefense.serving.app",
    },
)

__all__ = ["Client", "ServiceError", "ServingSettings", "create_app"]
