"""HTTP around the guard: settings, keys, bodies, the micro-batcher, problems, counters and the log.

The names are imported when they are first used: the settings need none of the service's packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.serving.http.settings import ServingSettings
    from nndefense.serving.http.state import ServingState

__getattr__ = importing(
    __name__, {"ServingSettings": "nndefense.serving.http.settings", "ServingState": "nndefense.serving.http.state"}
)

__all__ = ["ServingSettings", "ServingState"]
