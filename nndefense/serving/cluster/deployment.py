"""``nndefense serve --engine ray``: the same application in replicas on Ray Serve, over index shards in Ray actors."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nndefense import errors
from nndefense.database import Manifest
from nndefense.database.cluster import NAMESPACE, import_ray, join, leave
from nndefense.errors import DatabaseError, InputError, NNDefenseError
from nndefense.serving.cluster.door import Door
from nndefense.serving.cluster.replica import Replica, ReplicaBoard, ReplicaSpec
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import MAX_BATCH
from nndefense.serving.server import bind, run_server, server_of

START_SECONDS = 1800.0
_log = logging.getLogger(__name__)


def serve(
    guard: dict[str, Any],
    settings: ServingSettings,
    *,
    replicas: int = 1,
    shards: int = 1,
    max_replicas: int | None = None,
    ray_address: str | None = None,
    started: Callable[[list[str]], None] | None = None,
) -> None:
    """Serve until a signal ends it.

    Requests come in here, at a door with the limits of the service of one process; each is answered by one of the
    replicas, which batch what they are given. With ``threads`` set, the answers are those of the default engine with
    as many threads, to the last digit.

    Args:
        guard: arguments of :meth:`~nndefense.guard.Guard.open`; paths as every machine of the cluster has them.
        settings: the settings; ``queue`` and ``max_batch`` are each replica's. Without ``threads``, the processors are
            divided among the replicas.
        replicas: copies of the application, at least.
        shards: parts of the index.
        max_replicas: copies at most: Ray Serve adds some while more than a batch of requests is under way in each.
            None: as many as ``replicas``.
        ray_address: the cluster to join. None: one is started on this machine, and ended with the service.
        started: called with the URLs once requests are answered.

    Raises:
        InputError: numbers out of range, an address that cannot be bound, or Ray is not installed.
        NNDefenseError: the database or the classifier cannot be opened, or the cluster cannot be used.
    """
    most = replicas if max_replicas is None else max_replicas
    if not 1 <= replicas <= most or shards < 1:
        raise InputError(
            f"replicas is {replicas}, max_replicas {most} and shards {shards}: they must be at least 1, and replicas "
            "no more than max_replicas"
        )
    folder = Path(guard["database"]).resolve()
    Manifest.read(folder).check_files(folder, checksums=False)
    sockets = bind(settings.host, settings.port)
    processors = os.cpu_count() or 1
    # Set in any case: what a worker of Ray would choose is not what this process would.
    settings = replace(settings, threads=settings.threads or max(1, processors // most))
    spec = ReplicaSpec(
        {**_placed(guard), "database": folder}, settings, f"nndefense-{secrets.token_hex(4)}", shards, replicas
    )
    connected = False
    try:
        connected = join(ray_address, cpus=max(processors, most))
        with _deployed(spec, most, own=connected and ray_address is None) as (handle, board):
            door = Door(handle, board, settings, lambda old: retire(spec.name, old))
            run_server(server_of(door.app, door, settings), sockets, started)
    finally:
        for one in sockets:
            one.close()
        if connected:
            leave()


def retire(name: str, databases: set[str]) -> None:
    """End the index parts that an application holds for databases of these fingerprints."""
    _end_actors([f"{name}-{fingerprint[:16]}-" for fingerprint in databases])


@contextlib.contextmanager
def _deployed(spec: ReplicaSpec, most: int, *, own: bool) -> Iterator[tuple[Any, Any]]:
    """Deploy the application and wait until every replica serves; take it away at the end."""
    ray = import_ray()
    ray_serve = importlib.import_module("ray.serve")
    logging.getLogger("ray").setLevel(logging.ERROR)
    board = (
        ray.remote(ReplicaBoard)
        .options(
            name=spec.board, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=-1, max_task_retries=-1
        )
        .remote()
    )
    try:
        ray_serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        # The door says itself what matters of this; Ray Serve says it once for each request.
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
        free = ray.available_resources().get("CPU", 0)
        if free < spec.replicas:
            _log.warning("the cluster has %g free processors for %d replicas: waiting for more", free, spec.replicas)
        deployment = ray_serve.deployment(Replica).options(**_options(spec, most))
        handle = _run(ray_serve, deployment.bind(spec), spec, ray, board)
        yield handle, board
    finally:
        with contextlib.suppress(Exception):
            # Where others use this Ray Serve too, only what is ours ends.
            if own:
                ray_serve.shutdown()
            else:
                ray_serve.delete(spec.name)
        _end_actors([f"{spec.name}-"])


_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def _options(spec: ReplicaSpec, most: int) -> dict[str, Any]:
    settings = spec.settings
    options: dict[str, Any] = {
        "name": "defence",
        # The queue of each replica is bounded by itself, which answers with a problem where it is full.
        "max_ongoing_requests": settings.queue,
        "max_queued_requests": settings.max_connections,
        "graceful_shutdown_timeout_s": settings.grace + 5,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        "logging_config": _LOGGING,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1 if str(spec.guard.get("device")).startswith("cuda") else 0},
    }
    if most == spec.replicas:
        return {**options, "num_replicas": spec.replicas}
    return {
        **options,
        "autoscaling_config": {
            "min_replicas": spec.replicas,
            "max_replicas": most,
            "initial_replicas": spec.replicas,
            # More than a batch under way means that some wait.
            "target_ongoing_requests": settings.max_batch or MAX_BATCH,
            "upscale_delay_s": 10,
            "downscale_delay_s": 120,
        },
    }


def _run(ray_serve: Any, application: Any, spec: ReplicaSpec, ray: Any, board: Any) -> Any:
    """Deploy, but do not wait for Ray Serve's many attempts where a replica has said why it cannot start.

    In this thread: one that still waited for Ray Serve after this process has left the cluster would start another
    cluster in it, and the process would end with that.
    """
    target = ray_serve.RunTarget(application, name=spec.name, route_prefix=None)
    end = time.monotonic() + START_SECONDS
    try:
        (handle,) = ray_serve.run_many([target], wait_for_applications_running=False)
        while True:
            failure = ray.get(board.failure.remote())
            if failure is not None:
                raise _error(*failure)
            found = ray_serve.status().applications.get(spec.name)
            if found is not None and found.status == "DEPLOY_FAILED":
                raise RuntimeError(found.message or found.status)
            if found is not None and found.status == "RUNNING":
                return handle
            if time.monotonic() > end:
                raise DatabaseError(
                    f"the replicas were not ready within {START_SECONDS:g} seconds: check that the cluster has a "
                    f"processor for each of {spec.replicas} replicas, and memory for {spec.shards} index parts"
                )
            time.sleep(0.2)
    except NNDefenseError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DatabaseError(f"Ray Serve could not start the replicas ({reason}): see its logs") from error


def _error(kind: str, text: str) -> NNDefenseError:
    """The error that a replica has reported, as it would be without Ray."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NNDefenseError):
        return found(text)
    return DatabaseError(f"a replica could not start ({kind}: {text.strip().splitlines()[0] if text.strip() else ''})")


def _placed(guard: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with whole paths: the processes of Ray may stand in other folders."""
    found = dict(guard)
    for name in ("classifier", "calibration", "classes", "data_dir"):
        value = found.get(name)
        if isinstance(value, Path) or (isinstance(value, str) and Path(value).exists()):
            found[name] = Path(value).resolve()
    return found


def _end_actors(prefixes: list[str]) -> None:
    ray = import_ray()
    if not ray.is_initialized():
        return
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["namespace"] == NAMESPACE and one["name"].startswith(tuple(prefixes)):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(one["name"], namespace=NAMESPACE), no_restart=True)
