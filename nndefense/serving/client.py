"""A typed client of the service, with the standard library's HTTP.

::

    from nndefense.serving.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for prediction in client.classify("cat.jpg", "dog.png").predictions:
            print(prediction.class_name, prediction.probability, prediction.agree, prediction.percentile)
"""

from __future__ import annotations

import http.client
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from nndefense.errors import InputError, NNDefenseError
from nndefense.guard.prediction import Defended


class ServiceError(NNDefenseError):
    """An answer of the service other than success, or none at all; ``detail`` says what it is.

    Attributes:
        status: the HTTP status; 0 where no answer came.
        code: the word for programs, such as ``queue_full``; empty where the answer had none.
        retry_after: seconds after which to try again, or None.
    """

    def __init__(self, status: int, code: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"the service answered {status} ({code}): {detail}" if status else detail)
        self.status, self.code, self.retry_after = status, code, retry_after


@dataclass(frozen=True)
class Answer:
    """The predictions in the order of the images, and the fingerprints of classifier and database.

    The predictions have the digits of the JSON, and no probabilities besides those in their lists. ``body`` is the JSON
    as it came.
    """

    predictions: tuple[Defended, ...]
    model: str
    database: str
    body: bytes


class Client:
    """One connection to a service, kept open; not to be shared by threads.

    Args:
        url: such as ``http://127.0.0.1:8000``, or that of a reverse proxy with a path.
        key: the API key, where the service asks for one.
        timeout: seconds to wait for an answer.
        retries: how often to try again after a 503, waiting as long as it says, or after a broken connection.

    Raises:
        InputError: the URL is not one of http or https.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60, retries: int = 3) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not the address of a service: give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout)
        self._prefix, self._retries = parts.path.rstrip("/"), retries
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def classify(self, *images: str | Path | bytes, top: int | None = None, neighbors: int | None = None) -> Answer:
        """Classify image files, given by their paths or as bytes, in one request.

        Args:
            images: at least one, and no more than the service takes at once.
            top: classes in each list [default: 5].
            neighbors: neighbours of each image, up to the K of the defence [default: 10].

        Raises:
            InputError: no image, or a file that cannot be read.
            ServiceError: the service refused them, or could not be reached.
        """
        if not images:
            raise InputError("no image was given")
        boundary = uuid.uuid4().hex
        pieces: list[bytes] = []
        for image in images:
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="image"\r\n\r\n'
            pieces += [head.encode(), image if isinstance(image, bytes) else _content(Path(image)), b"\r\n"]
        pieces.append(f"--{boundary}--\r\n".encode())
        wanted = {name: value for name, value in (("top", top), ("neighbors", neighbors)) if value is not None}
        path = "/v1/classify" + (f"?{urlencode(wanted)}" if wanted else "")
        body = self._ask("POST", path, b"".join(pieces), f"multipart/form-data; boundary={boundary}")
        value = json.loads(body)
        return Answer(tuple(map(Defended.from_json, value["predictions"])), value["model"], value["database"], body)

    def neighbor_image(self, id: str) -> bytes:
        """The picture of the neighbour ``id`` as PNG; ServiceError of status 404 where it is not at hand."""
        return self._ask("GET", f"/v1/neighbors/{quote(id, safe='')}/image")

    def model(self) -> dict[str, Any]:
        """What is served: classes, input shape, K, weighting, fingerprints."""
        value: dict[str, Any] = json.loads(self._ask("GET", "/v1/model"))
        return value

    def ready(self) -> bool:
        """Whether the service is there and its database is loaded."""
        try:
            self._ask("GET", "/readyz", tries=1)
        except ServiceError:
            return False
        return True

    def reload(self) -> dict[str, Any]:
        """Have the database loaded again; with an administrator's key, where keys are asked for."""
        value: dict[str, Any] = json.loads(self._ask("POST", "/v1/admin/reload", tries=1))
        return value

    def _ask(
        self, method: str, path: str, body: bytes | None = None, kind: str | None = None, tries: int | None = None
    ) -> bytes:
        headers = {**self._headers, **({"content-type": kind} if kind else {})}
        left = tries if tries is not None else self._retries + 1
        while True:
            left -= 1
            try:
                self._connection.request(method, self._prefix + path, body, headers)
                answer = self._connection.getresponse()
                found = answer.read()
            except (OSError, http.client.HTTPException) as broken:
                self._connection.close()
                error, pause = ServiceError(0, "", f"the service cannot be reached ({type(broken).__name__})"), 0.1
            else:
                if answer.status == 200:
                    return found
                error = _error(answer.status, found, answer.headers.get("retry-after"))
                if answer.status != 503:
                    raise error
                pause = error.retry_after or 1.0
            if left <= 0:
                raise error
            time.sleep(pause)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the image {path} cannot be read ({error.strerror})") from error


def _error(status: int, body: bytes, retry_after: str | None) -> ServiceError:
    try:
        value = json.loads(body)
        code, detail = str(value["code"]), str(value["detail"])
    except (ValueError, KeyError, TypeError):
        # Not ours: a proxy on the way, perhaps.
        code, detail = "", "no details were given"
    return ServiceError(status, code, detail, float(retry_after) if retry_after and retry_after.isdigit() else None)
