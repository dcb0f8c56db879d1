"""Errors as problem details (RFC 9457): a status, a word for programs, a sentence for people, nothing of the inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nndefense.serving.pictures.limits import STATUS

MEDIA_TYPE = "application/problem+json"

PROBLEMS: dict[str, tuple[int, str]] = {
    "unauthorized": (401, "A key is needed"),
    "forbidden": (403, "This is not allowed"),
    "not_found": (404, "There is nothing here"),
    "method_not_allowed": (405, "This method does not work here"),
    "reload_failed": (409, "The new database could not be loaded; the old one keeps serving"),
    "wrong_host": (421, "This service does not answer under that name"),
    "internal": (500, "The server failed"),
    "not_ready": (503, "The database is being loaded"),
    "queue_full": (503, "Too many requests are waiting"),
    "timed_out": (503, "The prediction took too long"),
    "stopping": (503, "The server is being stopped"),
    **{code: (status, code.replace("_", " ").capitalize()) for code, status in STATUS.items()},
}
"""By code the status and the title, which is the same for every occurrence: the server's own problems, and those of a
refused request, whose title is the code in words."""

_OF_STATUS = {
    404: ("not_found", "check the path; /openapi.json lists those that exist"),
    405: ("method_not_allowed", "see the Allow header, or /openapi.json, for the methods of this path"),
}


class ServiceProblem(Exception):
    """An answer other than success.

    Args:
        code: one of :data:`PROBLEMS`.
        detail: what is wrong and what to do, without paths or internals.
        headers: further headers of the answer.
        status: another status than the code's own.
    """

    def __init__(
        self, code: str, detail: str, *, headers: Mapping[str, str] | None = None, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.headers = code, detail, dict(headers or {})
        self.status = status or PROBLEMS[code][0]


def busy(code: str, detail: str, seconds: float) -> ServiceProblem:
    """A 503 that says in how many seconds (at least 1, at most 60) to try again."""
    return ServiceProblem(code, detail, headers={"retry-after": str(max(1, min(60, round(seconds + 0.5))))})


def body_of(status: int, code: str, detail: str, request_id: str = "") -> bytes:
    """The JSON of a problem; ``type`` is a path of the service itself, under which the code is explained."""
    value: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": PROBLEMS[code][1],
        "status": status,
        "detail": detail,
        "code": code,
    }
    if request_id:
        value["instance"] = f"urn:uuid:{request_id}"
    return json.dumps(value, ensure_ascii=False).encode()


def of_status(status: int, headers: Mapping[str, str] | None = None) -> ServiceProblem:
    """The problem for a status that the framework itself answers with: an unknown path, a wrong method and such."""
    unclear = "the request could not be understood; /openapi.json describes what is expected"
    code, detail = _OF_STATUS.get(status, ("malformed_request" if status < 500 else "internal", unclear))
    return ServiceProblem(code, detail, headers=headers, status=status)


def explain(code: str) -> str | None:
    """A few lines about a problem type, or None for an unknown code."""
    status, title = PROBLEMS.get(code, (None, ""))
    return None if status is None else f"{code}: {title} (status {status}).\n"
