"""``nndefense serve``: from options to a running service."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

from nndefense.errors import InputError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    guard: dict[str, Any],
    settings: dict[str, Any],
    limits: dict[str, Any],
    *,
    engine: str = "local",
    replicas: int = 1,
    shards: int = 1,
    max_replicas: int | None = None,
    ray_address: str | None = None,
) -> None:
    """Serve until a signal ends it.

    Args:
        guard: arguments of :meth:`~nndefense.guard.Guard.open`.
        settings: values of :class:`~nndefense.serving.http.settings.ServingSettings`, without its limits.
        limits: values of :class:`~nndefense.serving.pictures.limits.Limits`.
        engine: ``local`` or ``ray``.
        replicas: with Ray, copies of the application.
        shards: with Ray, parts of the index.
        max_replicas: with Ray, copies at most.
        ray_address: with Ray, the cluster to join.

    Raises:
        InputError: packages are missing, or a setting cannot be used.
        NNDefenseError: the database or the classifier cannot be opened.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f'the service needs packages that are not installed ({", ".join(missing)}): pip install "nndefense[serve]"'
        )
    from nndefense.serving.http.settings import ServingSettings
    from nndefense.serving.pictures.limits import Limits

    chosen = ServingSettings(**settings, limits=Limits(**limits))
    if engine == "ray":
        if find_spec("ray") is None:
            raise InputError('--engine ray needs Ray: pip install "nndefense[ray]"')
        from nndefense.serving.cluster import deployment

        deployment.serve(
            guard,
            chosen,
            replicas=replicas,
            shards=shards,
            max_replicas=max_replicas,
            ray_address=ray_address,
            started=partial(deployment.announce, guard, chosen),
        )
        return
    if (replicas, shards, max_replicas, ray_address) != (1, 1, None, None):
        raise InputError("--replicas, --max-replicas, --shards and --ray-address are for --engine ray")
    from nndefense.guard import Guard
    from nndefense.serving.server import serve as run

    def started(addresses: list[str]) -> None:
        print(f"nndefense: {guard['database']} on {' and '.join(addresses)}; Ctrl-C ends it", flush=True)
        if chosen.allow_open and chosen.api_key_file is None:
            print("nndefense: warning: no keys are asked for; whoever reaches the address may use it", file=sys.stderr)

    run(partial(Guard.open, **guard), chosen, started=started)
