"""Applications of a small random model, within this process and over a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from latentdiff.serve.app import create_app
from latentdiff.serve.settings import Settings
from tests.random_models import make_pipeline


def small_model(folder: Path) -> str:
    """A random model of 32x32 pixels. Returns: where it is."""
    make_pipeline().save_pretrained(folder)
    return str(folder)


@contextmanager
def client_of(model: str, host: str = "localhost", **settings: Any) -> Iterator[TestClient]:
    """A client of an application; errors of the application are what it answers of them."""
    app = create_app(Settings(models=(model,), **settings))
    base = f"http://{host}"
    with TestClient(app, base_url=base, raise_server_exceptions=False) as client:
        yield client


@contextmanager
def served(model: str, **settings: Any) -> Iterator[tuple[str, FastAPI]]:
    """An application on a free port. Yields: its address, and itself."""
    app = create_app(Settings(models=(model,), **settings))
    config = uvicorn.Config(app, port=0, log_config=None, proxy_headers=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


def wait_until(what: Any) -> None:
    """Until a function says True; a minute is a hang."""
    for _ in range(6000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def file_of(pixels: Any, kind: str = "PNG") -> bytes:
    """An image file of an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.uint8(pixels))
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pixels_of(content: bytes) -> Any:
    with Image.open(BytesIO(content)) as image:
        return np.asarray(image).astype(int)
