"""Options of ``nndefense serve``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    ClassesOption,
    DatabaseOption,
    DataDirOption,
    DebugOption,
    Device,
    DeviceOption,
    KOption,
    ShapeOption,
    Weighting,
    WeightingOption,
    shape,
)


class Engine(str, Enum):
    """What the service runs on."""

    local = "local"
    ray = "ray"


MIB = 2**20


def serve(
    database: DatabaseOption,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", help="As for the other commands [default: the one that the database names]."),
    ] = None,
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
        typer.Option(
            "--allowed-host", help="Name that clients may use, such as that of a reverse proxy; repeat it for more."
        ),
    ] = None,
    demo_attacks: Annotated[
        bool, typer.Option("--demo-attacks", help="Let the page attack images on this server.")
    ] = False,
    reject_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Abstain on this share of clean images; needs a calibration.")
    ] = None,
    calibration_file: Annotated[
        Path | None, typer.Option(help="The calibration [default: guard.json of the database, where there is one].")
    ] = None,
    k: KOption = None,
    weighting: WeightingOption = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images in one batch [default: 32].")] = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits to be filled.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait; further ones get 503.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for a prediction; what takes longer gets 503.")] = 10.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish accepted requests at the end.")] = 30.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest body, MiB.")] = 16,
    max_images: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image, before it is scaled.")] = 25_000_000,
    body_seconds: Annotated[float, typer.Option(help="Seconds in which a body must have arrived.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the net and of the search.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of the access log [default: none is kept].")] = None,
    engine: Annotated[Engine, typer.Option(help="One process, or Ray Serve.")] = Engine.local,
    replicas: Annotated[int, typer.Option(min=1, help="With ray: copies of the application.")] = 1,
    shards: Annotated[int, typer.Option(min=1, help="With ray: parts of the index, an actor each.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With ray: copies under load [default: as many as --replicas].")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="With ray: HOST:PORT of a cluster [default: one on this machine is started].")
    ] = None,
    data_dir: DataDirOption = None,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    debug: DebugOption = False,
) -> None:
    """Serve defended predictions over HTTP, with a page for people at /. SIGHUP loads the database again."""
    from nndefense.cli import serve as work

    work.serve(
        {
            "database": database,
            "classifier": classifier,
            "k": k,
            "weighting": weighting.value if isinstance(weighting, Weighting) else None,
            "device": device.value,
            "reject_rate": reject_rate,
            "calibration": True if calibration_file is None else calibration_file,
            "classes": classes,
            "input_shape": shape(input_shape),
            "data_dir": data_dir,
        },
        {
            "host": host,
            "port": port,
            "api_key_file": api_key_file,
            "allow_open": allow_open,
            "allowed_hosts": tuple(allowed_host or ()),
            "demo_attacks": demo_attacks,
            "max_batch": max_batch,
            "max_wait_ms": max_wait_ms,
            "queue": queue,
            "timeout": timeout,
            "grace": grace,
            "threads": threads,
            "log_dir": log_dir,
        },
        {
            "max_body_bytes": max_body_mib * MIB,
            "max_image_bytes": min(8, max_body_mib) * MIB,
            "max_images": max_images,
            "max_pixels": max_pixels,
            "max_request_pixels": max(2 * max_pixels, 50_000_000),
            "body_seconds": body_seconds,
        },
        engine=engine.value,
        replicas=replicas,
        shards=shards,
        max_replicas=max_replicas,
        ray_address=ray_address,
    )
