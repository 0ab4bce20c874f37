"""The process that serves: from its start to a stop that loses nothing that can still be done."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Seconds that answers may take after a signal; images that are not done get a 503 before.
_LAST = 8


class _Server(uvicorn.Server):
    """uvicorn's, which ends in good order after a signal instead of raising it again."""

    def __init__(self, app: FastAPI, on_start: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                proxy_headers=False,  # `guard.Forwarded` reads them
                server_header=False,
                log_level="warning",
                timeout_graceful_shutdown=_LAST,
            )
        )
        self._engine, self._on_start = app.state.server.engine, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()  # or all that waits would be done first
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the second signal does not wait, nor hear of what it cuts off
            self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.should_exit = True


def run(app: FastAPI, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:    bound: what it listens on.  on_start: called once requests are answered.
    """
    _Server(app, on_start).run([bound])
