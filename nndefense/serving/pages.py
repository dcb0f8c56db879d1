"""The page for people: its files, as they lie in the package, and what it may offer."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nndefense.models.class_names import readable_names
from nndefense.serving.demo_attacks.routes import offer
from nndefense.serving.http.state import ServingState

_SCRIPTS = ("page", "answer", "api", "attack", "given", "prediction", "words")
FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    **{f"{name}.js": "text/javascript; charset=utf-8" for name in _SCRIPTS},
    "icon.svg": "image/svg+xml",
}
"""The files of the page with their types; nothing else of the folder is served."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The page's content security policy: nothing from elsewhere, no script or style but the files above."""


def router(state: ServingState) -> APIRouter:
    """``GET /``, ``GET /page/{name}`` and ``GET /page/settings.json``; the API's description leaves them out."""
    routes = APIRouter(include_in_schema=False)
    folder = resources.files("nndefense.serving").joinpath("page")
    files = {name: folder.joinpath(name).read_bytes() for name in FILES}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in files.items()}

    def answer(request: Request, name: str) -> Response:
        headers = {"etag": tags[name], "cache-control": "no-cache", "content-security-policy": POLICY}
        if tags[name] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=FILES[name], headers=headers)

    @routes.get("/")
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @routes.get("/page/settings.json")
    async def settings() -> Response:
        guard = state.guard
        attacks = offer(guard) if state.settings.demo_attacks else None
        return JSONResponse({"demo_attacks": attacks, "names": readable_names(guard.classes)})

    def add(name: str) -> None:
        @routes.get(f"/page/{name}")
        async def file(request: Request) -> Response:
            return answer(request, name)

    for name in FILES:
        add(name)
    return routes
