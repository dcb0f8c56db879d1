"""Ray, where it is asked for: joining a cluster, or starting a small one on this machine."""

from __future__ import annotations

import atexit
import importlib
import os
import secrets
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from nndefense.errors import DatabaseError, InputError

NAMESPACE = "nndefense"
"""The namespace of this package's actors."""
_OBJECT_BYTES = 256 * 2**20
_lock = threading.Lock()
_folder: Path | None = None


def import_ray() -> Any:
    """The ray module, or an error that says how to get it."""
    # Ray reports what it is used for to its makers unless it is told not to, and reads this once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError('Ray is not installed: pip install "ray[data,serve]"') from error


def join(address: str | None = None, *, cpus: int | None = None) -> bool:
    """Connect this process to Ray, unless it is connected already.

    Args:
        address: ``HOST:PORT`` of a running cluster, or ``ray://HOST:PORT``. None: a cluster of this machine alone is
            started, which ends with :func:`leave` or with the process.
        cpus: the processors that a cluster started here may use, as Ray counts them: a number to share out, which may
            be more than there are. None: those of the machine.

    Returns:
        Whether a connection was made, which the caller should then end.

    Raises:
        InputError: Ray is not installed.
        DatabaseError: the cluster cannot be reached or started.
    """
    if address is None and "ray" not in sys.modules:
        _close_to_strangers()
    ray = import_ray()
    with _lock:
        if ray.is_initialized():
            return False
        common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
        try:
            if address is None:
                _start(ray, common, cpus)
            else:
                ray.init(address=address, **common)
        except Exception as error:
            _remove_folder()
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = "Ray cannot be started here" if address is None else f"the Ray cluster {address} cannot be joined"
            raise DatabaseError(f"{what} ({reason}): check the address, the memory and the folder for files") from error
    return True


def leave() -> None:
    """End the connection, and with it a cluster that was started here."""
    ray = import_ray()
    with _lock:
        if ray.is_initialized():
            ray.shutdown()
        _remove_folder()


def address() -> str:
    """``HOST:PORT`` of the cluster that this process is connected to."""
    return str(import_ray().get_runtime_context().gcs_address)


def _start(ray: Any, common: dict[str, Any], cpus: int | None) -> None:
    global _folder
    # Sockets are made in this folder, and their whole paths may have 107 bytes at most.
    base = tempfile.gettempdir()
    _folder = Path(tempfile.mkdtemp(prefix="nnd-", dir=base if len(base) < 20 else "/tmp"))
    atexit.register(_remove_folder)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_BYTES,
        _temp_dir=str(_folder),
        **common,
    )


def _close_to_strangers() -> None:
    """Make a cluster that is started here ask for a secret, which its processes inherit.

    Ray listens on every network of the machine, whatever it is told, and whoever reaches it may run programs in it.
    It reads this when it is imported: a program that has done so already keeps what it chose.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _remove_folder() -> None:
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = None
