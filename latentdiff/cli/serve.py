"""Serve models: a web page, and the protocols of A1111 and OpenAI.

latentdiff serve
latentdiff serve my-model other-model.safetensors --lora-dir loras --port 8000
latentdiff serve models/ --host 0.0.0.0 --api-key KEY
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, command
from latentdiff.serve.settings import Settings

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: The least of each number, and what it is.
_NUMBERS = {
    "batch_size": (1, "images per pass"),
    "max_waiting": (1, "images that may wait in the queue"),
    "max_models": (1, "models in memory"),
    "idle_minutes": (0, "minutes without a request after which models leave the memory, 0: never"),
    "max_pixels": (1, "pixels of an image that is given or asked for"),
    "max_steps": (1, "steps of an image"),
    "replicas": (1, "processes on Ray Serve, a GPU each"),
}
#: Above it a number is a slip, and minutes are more than a thread can wait.
_MOST = 10**8


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
    several: dict[str, Any] = {"action": "append", "default": []}
    add(
        "--vae",
        dest="vaes",
        **several,
        metavar="NAME",
        help="another autoencoder that requests may name; may be repeated",
    )
    add(
        "--lora",
        dest="loras",
        **several,
        metavar="FILE[:WEIGHT]",
        help="a LoRA file that acts on every image; may be repeated",
    )
    add("--lora-dir", metavar="DIR", help="where <lora:name:0.7> finds name.safetensors")
    add(
        "--embedding",
        dest="embeddings",
        **several,
        metavar="FILE[=TOKEN]",
        help="a textual inversion, and its word in prompts; may be repeated",
    )
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
    add(
        "--allow-origin",
        dest="allow_origins",
        **several,
        metavar="URL",
        help="another site whose pages may ask, such as https://example.org; may be repeated",
    )
    add(
        "--trusted-proxy",
        dest="trusted_proxies",
        **several,
        metavar="ADDRESS",
        help="a reverse proxy whose X-Forwarded-* headers are believed; may be repeated",
    )
    add("--output", type=Path, metavar="DIR", help="keep the images as files too")
    for name, (_, words) in _NUMBERS.items():
        value, text = getattr(usual, name, 1), f"{words}; default: %(default)s"
        add(_option(name), type=type(value), default=value, metavar="N", help=text)
    add("--device", help="cpu, cuda, mps; default: what there is")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=usual.dtype,
        help="of weights and computation; default: %(default)s",
    )
    return parser.parse_args(argv)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options say.

    Raises:  UserError: an open server without a key, an empty key, a number out of its range, a
             proxy that is no address.
    """
    if args.api_key == "":
        raise UserError("the key is empty; leave --api-key and LATENTDIFF_API_KEY out for none.")
    if args.host not in _LOOPBACK and args.api_key is None and not args.open:
        raise UserError(
            f"--host {args.host} lets others ask; give them a key with --api-key KEY, or add "
            "--open if everyone may."
        )
    for name, (least, _) in _NUMBERS.items():
        if not least <= (value := getattr(args, name)) <= _MOST:
            raise UserError(f"{_option(name)} must be in {least} … {_MOST:,}; got {value}.")
    for address in args.trusted_proxies:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise UserError(f"--trusted-proxy must be an IP address or network; {error}.") from None
    args.root_path = "/" + args.root_path.strip("/") if args.root_path.strip("/") else ""
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
