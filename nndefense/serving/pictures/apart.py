"""Decoding what strangers send in a process of its own, which a picture may end without ending the service.

The process may take so much memory and no more, and once it has begun it can open no file and no connection. Each
thread that decodes has one, which begins with the first picture and again after it was ended.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nndefense.serving.pictures.decode import Shape, decode_all
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits, Refused, refused

_GRACE = 2.0
"""Seconds after the time for decoding in which an answer must have come."""
_START = 60.0
_CODE = "from nndefense.serving.pictures.apart import work; work()"
_here = threading.local()


def decode_images(images: Sequence[tuple[bytes, str | None]], limits: Limits, shape: Shape) -> list[Tensor]:
    """As :func:`~nndefense.serving.pictures.decode.decode_all`, in another process where ``limits.decoder_mib`` asks.

    Raises:
        Refused: also where the process takes too much memory, or is ended by an image.
    """
    if not limits.decoder_mib:
        return decode_all(images, limits, shape)
    child: _Child | None = getattr(_here, "child", None)
    if child is None or child.limits != limits or child.ended:
        child = _here.child = _Child(limits)
    return child.decode(images, shape)


class _Child:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            # Ctrl-C is for the service alone, which ends this one by closing its input.
            start_new_session=True,
        )
        self._exchange({"limits": asdict(limits)}, (), _START)

    def __del__(self) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def ended(self) -> bool:
        """Whether it was ended, by an image or from outside."""
        return self._process.poll() is not None

    def decode(self, images: Sequence[tuple[bytes, str | None]], shape: Shape) -> list[Tensor]:
        """See :func:`decode_images`."""
        asked = {"shape": shape, "images": [(len(data), media_type) for data, media_type in images]}
        told = self._exchange(asked, [data for data, _ in images], self.limits.decode_seconds + _GRACE)
        if "refused" in told:
            raise Refused(*told["refused"])
        assert self._process.stdout is not None
        pixels = np.frombuffer(_exactly(self._process.stdout, 4 * len(images) * int(np.prod(shape))), np.float32)
        return list(torch.from_numpy(pixels.reshape(len(images), *shape).copy()))

    def _exchange(self, asked: dict[str, Any], contents: Sequence[bytes], seconds: float) -> dict[str, Any]:
        expired = threading.Event()

        def end() -> None:
            expired.set()
            self._process.kill()

        late = threading.Timer(seconds, end)
        late.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
            for part in (json.dumps(asked).encode() + b"\n", *contents):
                self._process.stdin.write(part)
            self._process.stdin.flush()
            return dict(json.loads(self._process.stdout.readline()))
        except (OSError, ValueError):
            self._process.kill()
            self._process.wait()
            if expired.is_set():
                raise refused("decode_timeout", "the images take too long to be decoded: scale them down") from None
            raise refused("damaged_image", "the image file ends the decoder: repair or replace it") from None
        finally:
            late.cancel()


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise refused("damaged_image", "the image file ends the decoder: repair or replace it")
    return data


def work() -> None:
    """What the process does: decode what comes in, until there is no more."""
    import resource

    # Only messages of ours may go where answers go.
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    limits = Limits(**json.loads(given.readline())["limits"])
    # What is imported for a first picture of each kind must be there before no file can be opened.
    Image.init()
    for form in MEDIA_TYPES.values():
        picture, turned = io.BytesIO(), Image.Exif()
        turned[0x0112] = 6
        Image.new("RGB", (2, 1)).save(picture, form, exif=turned)
        decode_all([(picture.getvalue(), None)], limits, (3, 2, 2))
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    most = {
        resource.RLIMIT_DATA: used + (limits.decoder_mib << 20),
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in most.items():
        resource.setrlimit(kind, (value, value))
    answers.write(b"{}\n")
    answers.flush()
    while line := given.readline():
        asked = json.loads(line)
        images = [(given.read(size), media_type) for size, media_type in asked["images"]]
        try:
            decoded = decode_all(images, limits, tuple(asked["shape"]))
            answers.write(b"{}\n" + b"".join(image.numpy().tobytes() for image in decoded))
        except MemoryError:
            what = f"the images take more than {limits.decoder_mib:,} MiB to be decoded: scale them down"
            answers.write(json.dumps({"refused": [413, "too_many_pixels", what]}).encode() + b"\n")
        except Refused as error:
            answers.write(json.dumps({"refused": [error.status, error.code, error.detail]}).encode() + b"\n")
        answers.flush()
