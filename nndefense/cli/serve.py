"""``nndefense serve``."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.declare import OneOf, Only
from nndefense.cli.options import Common, DatabaseOptions, ImagesOption, RuleOptions
from nndefense.cli.streams import one_line
from nndefense.errors import InputError

# Modules, and the packages that they come in.
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_MIB = 2**20


def serve(
    *,
    data: DatabaseOptions,
    host: Annotated[str, typer.Option(help="Address to bind; others than loopback need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, a line each; admin:KEY for those that may reload.")
    ] = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Serve without keys although others can reach the address.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients may use, such as that of a reverse proxy; repeat it for more."),
    ] = None,
    demo_attacks: Annotated[
        bool, typer.Option("--demo-attacks", help="Let the page attack images on this server.")
    ] = False,
    images: ImagesOption = None,
    reject_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Abstain on this share of clean images; needs a calibration.")
    ] = None,
    calibration_file: Annotated[
        Path | None, typer.Option(help="The calibration [default: guard.json of the database, where there is one].")
    ] = None,
    rule: RuleOptions,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images in one batch [default: 32].")] = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits to be filled.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait; further ones get 503.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for a prediction; what takes longer gets 503.")] = 10.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish accepted requests at the end.")] = 30.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest body, MiB.")] = 16,
    max_images: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image, before it is scaled.")] = 25_000_000,
    decoder_mib: Annotated[
        int, typer.Option(min=0, help="MiB for a process of its own that decodes; 0: the server decodes.")
    ] = 0,
    body_seconds: Annotated[float, typer.Option(help="Seconds in which a body must have arrived.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the net and of the search.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of the access log [default: none is kept].")] = None,
    engine: Annotated[str, OneOf("One process, or Ray Serve.", ("local", "ray"))] = "local",
    replicas: Annotated[int, typer.Option(min=1, help="With ray: copies of the application.")] = 1,
    shards: Annotated[int, typer.Option(min=1, help="With ray: parts of the index, an actor each.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With ray: copies under load [default: as many as --replicas].")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="With ray: HOST:PORT of a cluster [default: one on this machine is started].")
    ] = None,
    common: Annotated[Common, Only("data_dir", "device", "quiet", "debug")],
) -> None:
    """Serve defended predictions over HTTP, with a page for people at /. SIGHUP loads the database again."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            "the service needs packages that are not installed: pip install "
            + " ".join(_NEEDED[name] for name in missing)
        )
    from nndefense.serving.http.settings import ServingSettings
    from nndefense.serving.pictures.limits import Limits

    guard = data.guard(common) | {
        **rule.asked(),
        "reject_rate": reject_rate,
        "calibration": True if calibration_file is None else calibration_file,
        "images": images,
    }
    settings = ServingSettings(
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_open=allow_open,
        allowed_hosts=tuple(allowed_host or ()),
        demo_attacks=demo_attacks,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue=queue,
        timeout=timeout,
        grace=grace,
        threads=threads,
        log_dir=log_dir,
        limits=Limits(
            max_body_bytes=max_body_mib * _MIB,
            max_image_bytes=min(8, max_body_mib) * _MIB,
            max_images=max_images,
            max_pixels=max_pixels,
            max_request_pixels=max(2 * max_pixels, 50_000_000),
            decoder_mib=decoder_mib,
            body_seconds=body_seconds,
        ),
    )

    def started(addresses: list[str]) -> None:
        where = f"{' and '.join(addresses)}; {f'Ray at {address()}; ' if engine == 'ray' else ''}Ctrl-C ends it"
        if not common.quiet:
            print(one_line(f"nndefense: {data.database} on {where}"), flush=True)
        if allow_open and api_key_file is None:
            print("nndefense: warning: no keys are asked for; whoever reaches the address may use it", file=sys.stderr)

    if engine == "ray":
        if find_spec("ray") is None:
            raise InputError('--engine ray needs Ray: pip install "ray[data,serve]"')
        from nndefense.database.cluster import address
        from nndefense.serving.cluster import serve as run_on_ray

        run_on_ray(
            guard,
            settings,
            replicas=replicas,
            shards=shards,
            max_replicas=max_replicas,
            ray_address=ray_address,
            started=started,
        )
        return
    if (replicas, shards, max_replicas, ray_address) != (1, 1, None, None):
        raise InputError("--replicas, --max-replicas, --shards and --ray-address are for --engine ray")
    from nndefense.guard import Guard
    from nndefense.serving.server import serve as run

    run(partial(Guard.open, **guard), settings, started=started)
