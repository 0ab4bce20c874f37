"""Several replicas of the server on Ray Serve, on the GPUs and machines of one Ray cluster.

Each replica is the same application with models and a queue of its own; Ray's proxy spreads
requests. So /sdapi/v1/progress and interrupt see what their replica does, and no options can be
set. On several machines, links to images need --output on a disk that all of them share.

    RAY_ADDRESS=… latentdiff serve --replicas 4     joins a cluster; without, starts one here

Source: https://docs.ray.io/en/latest/serve/http-guide.html
"""

from __future__ import annotations

import signal
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.serve.settings import Settings


def run(settings: Settings, replicas: int) -> None:
    """Serve until interrupted.

    Raises:  UserError: Ray is not installed, or a model cannot be served.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError("--replicas needs: pip install latentdiff[serve,ray]") from None
    import torch

    own = tempfile.TemporaryDirectory(prefix="latentdiff-")
    # A link to an image may be followed at another replica than the one that made it.
    settings = replace(settings, links=(settings.output or Path(own.name)) / "links")

    def build() -> Any:
        from latentdiff.serve.app import create_app

        app = create_app(settings)
        with app.state.server.models.use(None, None):
            pass  # what cannot be loaded ends here
        return app

    gpus = torch.cuda.is_available()
    # Each takes as many requests as its own queue does; Ray must not hold them back.
    most = settings.max_waiting + settings.batch_size
    replica: Any = serve.deployment(
        serve.ingress(build)(),
        num_replicas=replicas,
        max_ongoing_requests=most,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
        graceful_shutdown_timeout_s=10,
    )
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        try:
            serve.run(replica.bind(), name="latentdiff", route_prefix="/")
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the replicas did not start: {reason}") from error
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # Ray has set one of its own
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
        own.cleanup()
