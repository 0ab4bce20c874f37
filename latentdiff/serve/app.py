"""The application: who may ask, how much, what errors look like, and the protocols' routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from latentdiff import __version__
from latentdiff.errors import UserError
from latentdiff.serve import a1111, native
from latentdiff.serve.engine import Cancelled, Engine, Full, Stopping
from latentdiff.serve.models import Models
from latentdiff.serve.requests import Server, server_of
from latentdiff.serve.settings import Settings

PAGE = Path(__file__).parent / "page"


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
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(
        title="latentdiff",
        version=__version__,
        root_path=settings.root_path,
        lifespan=lifespan,
    )
    app.state.server = Server(settings, models, engine)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(Full, _full)
    app.add_exception_handler(Stopping, _stopping)
    app.add_exception_handler(Cancelled, _gone)
    app.include_router(native.router)
    app.include_router(a1111.router)
    app.add_api_route("/health", health)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def health(request: Request) -> dict[str, Any]:
    """Whether it works, and how much it has to do."""
    server = server_of(request)
    engine = server.engine
    doing = {"making": len(engine.running), "waiting": engine.waiting}
    return {"status": "ok", **doing, "loaded": server.models.loaded}


def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


def _full(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Full)
    return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.seconds)})


def _stopping(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 503)


def _gone(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the client went away."}, 499)  # as nginx calls it
