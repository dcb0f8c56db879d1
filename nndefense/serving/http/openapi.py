"""The OpenAPI description: what the framework cannot know by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nndefense.serving.http.problem import MEDIA_TYPE
from nndefense.serving.http.schema import ClassifyJson, ProblemAnswer
from nndefense.serving.http.security import OPEN_FOLDERS, OPEN_PATHS
from nndefense.serving.http.settings import ServingSettings

_MEANINGS = {
    400: "The body cannot be understood.",
    401: "A key is needed.",
    403: "Not allowed.",
    404: "There is nothing here.",
    405: "This method does not work here.",
    408: "The body came too slowly.",
    409: "The new database could not be loaded; the old one keeps serving.",
    413: "Too much of something: bytes, parts, images or pixels.",
    415: "Not an image format that is read here, or not the one that was declared.",
    421: "The service does not answer under that name.",
    422: "An argument out of range, or an image that cannot be decoded.",
    431: "The path and the headers are too large.",
    503: "Too busy, or not ready; Retry-After says when to try again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of answers with problem details."""
    schema = {"$ref": "#/components/schemas/ProblemAnswer"}
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": schema}},
            **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if status == 503 else {}),
        }
        for status in statuses
    }


def describe(app: FastAPI, settings: ServingSettings) -> None:
    """Make ``app.openapi`` complete: shapes of bodies that routes read themselves, keys, and errors of every route."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        value = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            description="Predictions of the nearest-neighbour defence, with the neighbours that they rest on. "
            "Errors are problem details (RFC 9457).",
            license_info=None,
        )
        schemas = value.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for model in (ClassifyJson, ProblemAnswer):
            schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        keyed = settings.api_key_file is not None
        if keyed:
            value["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        for path, methods in value["paths"].items():
            closed = keyed and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS)
            for method, operation in methods.items():
                everywhere = [400, 413, 421, 431, *([401, 403] if closed else []), *([403] if method == "post" else [])]
                answers = operation["responses"]
                # The framework describes its own form of this one, which is never sent.
                if MEDIA_TYPE not in answers.get("422", {}).get("content", {}) and "422" in answers:
                    answers.update({"422": problems(422)[422]})
                for status, answer in problems(*everywhere).items():
                    answers.setdefault(str(status), answer)
                if closed:
                    operation["security"] = [{"bearer": []}, {"header": []}]
        app.openapi_schema = value
        return value

    app.openapi = openapi  # type: ignore[method-assign]
