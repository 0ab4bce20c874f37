"""The application: the protocols' routes, what errors look like, and figures about it all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Template
from pydantic_core import PydanticSerializationError
from starlette.exceptions import HTTPException

from latentdiff import __version__
from latentdiff.errors import UserError
from latentdiff.serve import a1111, native, openai
from latentdiff.serve.engine import Cancelled, Engine, Full, Stopping
from latentdiff.serve.files import Links, Output
from latentdiff.serve.guard import (
    FAILED,
    Cors,
    Forwarded,
    Guard,
    errors_of,
    hider,
    origins_of,
    refused,
)
from latentdiff.serve.metrics import Counted, Figures, figures
from latentdiff.serve.models import Models
from latentdiff.serve.requests import Server, server_of
from latentdiff.serve.settings import Settings

PAGE = Path(__file__).parent / "page"
_DOCS = Path(__file__).parent / "docs.html"


def create_app(settings: Settings) -> FastAPI:
    """The application of one server, or of one of several replicas.

    Raises:  UserError: models, LoRA files or words that are not there.
    """
    models = Models(settings)
    engine = Engine(
        models,
        batch_size=settings.batch_size,
        max_waiting=settings.max_waiting,
        idle=settings.idle_minutes * 60,
        hide=hider(settings),
        keep=None if settings.output is None else Output(settings.output).keep,
    )
    links = Links(settings.links)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        links.close()

    app = FastAPI(
        title="latentdiff",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from the internet
        redoc_url=None,
    )
    app.state.server = Server(settings, models, engine, links)
    app.state.figures = Figures(engine)
    _add_errors(app)
    for router in (native.router, a1111.router, openai.router):
        app.include_router(router)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", figures)
    app.add_api_route("/docs", docs)
    app.add_api_route("/internal/ping", a1111.ping)
    app.mount("/", Page(directory=PAGE, html=True))
    # The last one added is the first that a request passes.
    app.add_middleware(Guard, settings=settings, origins=origins_of(settings))
    app.add_middleware(Cors, allow_origins=origins_of(settings))
    app.add_middleware(Counted, figures=app.state.figures)
    app.add_middleware(Forwarded, settings=settings)
    return app


class Page(StaticFiles):
    """The page: no other site frames it, and a browser asks whether its copy is the newest."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update({"X-Frame-Options": "DENY", "Cache-Control": "no-cache"})
        return response


def health(request: Request) -> dict[str, Any]:
    """Whether it works, and how much it has to do."""
    server = server_of(request)
    engine = server.engine
    doing = {"making": len(engine.running), "waiting": engine.waiting}
    return {"status": "ok", **doing, "loaded": server.models.loaded}


def docs(request: Request) -> HTMLResponse:
    """What may be asked, as a page that needs no network; for programs it is /openapi.json."""
    schema = request.app.openapi()
    return HTMLResponse(Template(_DOCS.read_text("utf-8"), autoescape=True).render(schema=schema))


def _add_errors(app: FastAPI) -> None:
    """Have errors answered in words, without a traceback or a path of this machine.

    Of what nobody thought of the server's log has the traceback, and the client the fact.
    """

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        text = server_of(request).engine.hide(str(error))
        about = {name: getattr(error, name, None) for name in ("param", "code")}
        return refused(request.scope, 422, text, **about)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refused(request.scope, 422, errors_of(error.errors()))

    @app.exception_handler(UnicodeEncodeError)
    @app.exception_handler(PydanticSerializationError)
    async def no_text(request: Request, error: Exception) -> JSONResponse:
        if "surrogates" not in str(error):
            raise error
        text = "a text of the request holds half of a character (of a surrogate pair)."
        return refused(request.scope, 422, text)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return refused(request.scope, error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        headers = {"Retry-After": str(error.seconds)}
        return refused(request.scope, 429, str(error), headers, code="rate_limit_exceeded")

    @app.exception_handler(Stopping)
    async def stopping(request: Request, error: Stopping) -> JSONResponse:
        return refused(request.scope, 503, str(error))

    @app.exception_handler(Cancelled)
    async def cancelled(request: Request, error: Cancelled) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return refused(request.scope, 500, FAILED)
