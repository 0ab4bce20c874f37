"""Serve models: a web page, and the protocols of A1111 and OpenAI.

latentdiff serve
latentdiff serve my-model other-model.safetensors --lora-dir loras --port 8000
latentdiff serve models/ --host 0.0.0.0 --api-key KEY
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, command
from latentdiff.serve.settings import Settings

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; nothing heavy is imported yet, so --help is instant."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("latentdiff serve", description=__doc__, formatter_class=form)
    add, usual = parser.add_argument, Settings()
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="folder, file, hub id, or a folder of models; the first is the default",
    )
    add("--vae", action="append", dest="vaes", default=[], metavar="NAME", help="may be repeated")
    add("--lora", action="append", dest="loras", default=[], metavar="FILE[:WEIGHT]")
    add("--lora-dir", metavar="DIR", help="where <lora:name:0.7> finds name.safetensors")
    add("--embedding", action="append", dest="embeddings", default=[], metavar="FILE[=TOKEN]")
    add("--host", default=usual.host, help="default: %(default)s")
    add("--port", type=int, default=usual.port, help="default: %(default)s")
    add(
        "--api-key",
        default=os.environ.get("LATENTDIFF_API_KEY"),
        metavar="KEY",
        help="who has it may ask; also as LATENTDIFF_API_KEY, which others cannot see",
    )
    add("--open", action="store_true", help="serve on another host without a key")
    add("--root-path", default="", metavar="PATH", help="where a reverse proxy shows the server")
    add("--allow-origin", action="append", dest="allow_origins", default=[], metavar="URL")
    add("--trusted-proxy", action="append", dest="trusted_proxies", default=[], metavar="ADDRESS")
    add("--output", type=Path, metavar="DIR", help="keep the images as files too")
    add("--batch-size", type=int, default=usual.batch_size, metavar="N", help="images per pass")
    add("--max-waiting", type=int, default=usual.max_waiting, metavar="N", help="images in queue")
    add("--max-models", type=int, default=usual.max_models, metavar="N", help="models in memory")
    add("--idle-minutes", type=float, default=0, metavar="N", help="then models leave the memory")
    add("--replicas", type=int, default=1, metavar="N", help="on Ray Serve, a GPU each")
    add("--device", help="cpu, cuda, mps; default: what there is")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=usual.dtype)
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options say. Raises: UserError: an open server without a key, an empty key."""
    if args.api_key == "":
        raise UserError("the key is empty; leave --api-key and LATENTDIFF_API_KEY out for none.")
    if args.host not in _LOOPBACK and args.api_key is None and not args.open:
        raise UserError(
            f"--host {args.host} lets others ask; give them a key with --api-key KEY, or add "
            "--open if everyone may."
        )
    given: dict[str, Any] = {}
    for name in {field.name for field in fields(Settings)} & set(vars(args)):
        value = getattr(args, name)
        given[name] = tuple(value) if isinstance(value, list) else value
    return Settings(**given)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    args = parse(arguments)
    settings = settings_of(args)
    if args.replicas != 1:
        from latentdiff.serve import replicas

        return replicas.run(settings, args.replicas)
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("latentdiff serve needs: pip install latentdiff[serve]") from None
    with listening(settings.host, settings.port) as bound:
        from latentdiff.serve.app import create_app
        from latentdiff.serve.server import run

        app = create_app(settings)
        with app.state.server.models.use(None, None):
            pass  # the first request need not wait, and what cannot be loaded ends here
        run(app, bound, lambda: print(_greeting(settings, bound), flush=True))
    print("stopped.", flush=True)
    if not app.state.server.engine.ended(1):
        os._exit(0)  # else PyTorch aborts, of which a thread is within a step


def listening(host: str, port: int) -> socket.socket:
    """A socket on which who connects waits until it is served. Raises: UserError: it is taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"nothing can be served on port {port} of {host or 'all addresses'} ({reason}). "
            "Stop what is there, or name another with --port."
        ) from None


def _greeting(settings: Settings, bound: socket.socket) -> str:
    """Where the server is, and how to get in."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = [f"latentdiff serves on http://{host}:{bound.getsockname()[1]}{settings.root_path}"]
    if settings.api_key is not None:
        lines.append("Log in with any name and the key as the password.")
    return "\n".join([*lines, "Ctrl-C stops it."])
