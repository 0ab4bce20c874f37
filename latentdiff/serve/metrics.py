"""Figures about the server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from latentdiff.serve.engine import Engine


class Figures:
    """Those of one application."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        self.requests = Counter(
            "latentdiff_requests",
            "Requests that were answered",
            ["route", "status"],
            registry=self.registry,
        )


class _OfEngine(Collector):
    """Read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield CounterMetricFamily("latentdiff_images", "Images that were made", engine.made)
        yield CounterMetricFamily(
            "latentdiff_seconds", "Seconds in which images were made", engine.seconds
        )
        for name, text, value in (
            ("waiting_images", "Images in the queue", engine.waiting),
            ("running_requests", "Requests whose images are being made", len(engine.running)),
            ("seconds_per_image", "What one takes, lately", engine.pace),
            ("loaded_models", "Models in memory", len(engine.models.loaded)),
        ):
            yield GaugeMetricFamily(f"latentdiff_{name}", text, value)


class Counted:
    """Counts the answers by route, of which there are so many, and by status."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "")
                self._figures.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


async def figures(request: Request) -> Response:
    """Figures about the server, for Prometheus."""
    registry = request.app.state.figures.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
