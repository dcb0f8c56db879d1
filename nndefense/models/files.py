"""Files of a model folder: written so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from nndefense import files
from nndefense.errors import InputError, ModelError, one_line
from nndefense.files import json_text, sealed, unsealed


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of ``path``, whole or not at all.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    try:
        files.write_bytes(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): free space or choose another folder") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record with its digest as indented JSON, whole or not at all."""
    write_bytes(path, json_text(sealed(value)).encode())


def read_json(path: Path, form: str, version: int, remedy: str) -> tuple[dict[str, Any], bool]:
    """Read a JSON object whose keys ``format`` and ``version`` are ``form`` and ``version``.

    Returns:
        its values, and whether they had a digest, which those of older versions lack.

    Raises:
        ModelError: the file is missing, broken, changed since it was written, of another format or of a newer version.
    """
    try:
        value = json.loads(files.read_whole(path))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}): {remedy}") from None
    if not isinstance(value, dict) or value.get("format") != form:
        raise ModelError(f"{path} is not of the format {form}: {remedy}")
    if value.get("version") != version:
        raise ModelError(
            f"{path} has format version {value.get('version')}, but this nndefense reads version {version}: "
            "use the version of nndefense that wrote it"
        )
    try:
        return unsealed(value)
    except ValueError as error:
        raise ModelError(f"{path} cannot be used, because {error}: {remedy}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its sha256, as hexadecimal digits."""
    # Clones, because the format refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(copies)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU, whose sha256 must be ``sha256``.

    Raises:
        ModelError: the file is missing, damaged or cut short.
    """
    try:
        with files.open_regular(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {remedy}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(f"{path} is damaged or cut short (its sha256 is not the recorded one): {remedy}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file ({one_line(error)}): {remedy}") from None
