"""Who may ask, from where, and how much: what a request passes before it reaches a route.

Plain ASGI: what is built on Starlette's BaseHTTPMiddleware does not see that a client has gone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from latentdiff.errors import UserError, whole_text
from latentdiff.serve.engine import Stopping

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from latentdiff.serve.settings import Settings

#: Hosts that stand for all addresses of a machine.
_ALL_ADDRESSES = ("", "0.0.0.0", "::")
#: What clients are told of an error that nobody thought of.
FAILED = "the server failed; its log says of what."
#: What has a name that cannot be guessed, for pages to show, which send no key for an image.
_LINKS = "/v1/images/files/"
#: Methods that change nothing, so that any site may have a browser send them.
_SAFE = ("GET", "HEAD", "OPTIONS")
#: Folders of an absolute path; no part of a URL.
_FOLDERS = re.compile(r"""(?<![\w:/\\.<~])(?:~|[A-Za-z]:)?[\\/](?:[^\s'"\\/:*?<>|]+[\\/])+""")


def refused(
    scope: Scope,
    status: int,
    detail: Any,
    headers: dict[str, str] | None = None,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An answer that says what was wrong, as clients of the path expect it.

    Args:    detail: in words, or pydantic's list of errors.
             param, code: for OpenAI's clients: the field, and a word of theirs.
    """
    if not _path(scope).startswith("/v1/"):
        return JSONResponse({"detail": detail}, status, headers)
    status = 400 if status == 422 else status
    if isinstance(detail, list):
        param = next(iter(_fields(detail[0]["loc"])), None)
        detail = "; ".join(f"{_place(one['loc'])}: {one['msg']}" for one in detail)
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    error = {"message": detail, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


def failure(error: Exception) -> str:
    """What the last event of a stream says of an error; the log has the traceback of one that
    nobody thought of."""
    if isinstance(error, UserError | Stopping):
        return str(error)
    logging.getLogger("uvicorn.error").error("a stream ended with an error", exc_info=error)
    return FAILED


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _fields(loc: list[Any]) -> list[str]:
    """The names in a place; its numbers are of characters or of list entries."""
    return [part for part in loc if isinstance(part, str) and part != "body"]


def _place(loc: list[Any]) -> str:
    return ".".join(_fields(loc)) or "body"


def errors_of(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Pydantic's errors without what was given, which may be large, or nothing that JSON holds."""
    return [
        {
            "type": one["type"],
            "loc": [part if isinstance(part, int) else whole_text(part) for part in one["loc"]],
            "msg": whole_text(one["msg"]),
        }
        for one in found
    ]


class Forwarded(ProxyHeadersMiddleware):
    """Behind a trusted proxy: client, scheme and host are those that the proxy was asked with.

    Paths may begin with the `root_path` under which it shows the server, or not.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        super().__init__(app, list(settings.trusted_proxies))
        self._root = settings.root_path.rstrip("/")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["root_path"] = self._root
        client = scope.get("client")
        if client and client[0] in self.trusted_hosts:
            headers = MutableHeaders(scope=scope)
            host = headers.get("x-forwarded-host", "").rpartition(",")[2].strip()
            if host:  # of several the nearest proxy's, which alone is known to be its own
                scope["latentdiff.host"] = headers.get("host", "")
                headers["host"] = host
        await super().__call__(scope, receive, send)


class Cors(CORSMiddleware):
    """Answers pages of other sites that were allowed; it leaves all else to the application."""

    def __init__(self, app: ASGIApp, allow_origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] == "http" and self.is_allowed_origin(
            Headers(scope=scope).get("origin", "")
        )
        if allowed:
            return await super().__call__(scope, receive, send)

        async def varied(message: Message) -> None:
            if message["type"] == "http.response.start":  # or caches give it to allowed pages
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        await self.app(scope, receive, varied if self.allow_origins else send)


class Guard:
    """Refuses whom the settings do not let in, and what is too large."""

    def __init__(self, app: ASGIApp, settings: Settings, origins: list[str]) -> None:
        self.app, self._settings, self._origins = app, settings, origins
        self._names = _names(settings.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._refusal(scope, Headers(scope=scope))
        if answer is not None:
            await answer(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        key, most = self._settings.api_key, self._settings.max_body
        host, origin = headers.get("host", ""), headers.get("origin", "")
        # A foreign name that leads here is how a web page gets around the browser's rules. The name
        # is that which the browser or the proxy connected to: X-Forwarded-Host may be the page's,
        # whose requests come from loopback as a proxy's do.
        named = scope.get("latentdiff.host", host)
        if key is None and not self._is_own(named):
            text = f"{named!r:.100} is no name of this server. Open it by its address or as"
            text += " localhost, start it with --api-key, or allow the name with --allow-origin"
            return refused(scope, 403, f"{text} http://NAME, also if it is that of a proxy.")
        public = scope["method"] == "GET" and _path(scope).startswith(_LINKS)
        if key is not None and not public and not _has_key(headers, key):
            basic = {"WWW-Authenticate": 'Basic realm="latentdiff", charset="UTF-8"'}
            text = "the key is missing or wrong: send it as a bearer token or as the password."
            return refused(scope, 401, text, basic, code="invalid_api_key")
        if scope["method"] not in _SAFE and self._is_foreign(headers):
            text = f"pages of {origin!r:.100} may not ask; --allow-origin allows it."
            return refused(scope, 403, text)
        if headers.get("content-length", "").isdecimal() and int(headers["content-length"]) > most:
            return refused(scope, 413, _too_large(most), {"Connection": "close"})
        return None

    def _is_own(self, host: str) -> bool:
        """Whether it is a name that the server was given, or that of an allowed page."""
        if self._settings.host in _ALL_ADDRESSES:
            return True
        if host.lower() in [one.partition("://")[2] for one in self._origins]:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a page of another site, that was not allowed, had a browser ask."""
        origin = headers.get("origin")
        if origin is None or headers.get("sec-fetch-site") == "same-origin":
            return False
        own = origin.partition("://")[2] == headers.get("host")
        return not own and origin not in self._origins

    def _limited(self, receive: Receive) -> Receive:
        most, seen = self._settings.max_body, 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, _too_large(most), {"Connection": "close"})
            return message

        return counted


def _names(bound: str) -> set[str]:
    """What a server on that host is called: where others reach it, also as the machine is."""
    own = {"localhost", bound}
    if bound in (*_ALL_ADDRESSES, "localhost", "127.0.0.1", "::1"):
        return own
    machine = socket.gethostname().lower()
    return own | {machine, f"{machine}.local", socket.getfqdn().lower()}


def _too_large(most: int) -> str:
    return f"a request may have {most:,} bytes."


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    secret = given.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            secret = base64.b64decode(secret).partition(b":")[2]
        except binascii.Error:
            return False
    known = scheme.lower() in ("basic", "bearer")
    return hmac.compare_digest(secret, key.encode()) and known


def origins_of(settings: Settings) -> list[str]:
    """The allowed origins as browsers write them: small letters, no slash at the end."""
    return [one.rstrip("/").lower() for one in settings.allow_origins]


def hider(settings: Settings) -> Callable[[str], str]:
    """A function that takes the folders of this machine out of a text, and leaves names."""
    named = [*settings.models, *settings.vaes, settings.lora_dir, settings.output]
    named += [one.rpartition(":")[0] or one for one in settings.loras]
    named += [one.partition("=")[0] for one in settings.embeddings]
    paths = [Path(one).expanduser() for one in named if one is not None]
    paths = [one for one in paths if one.is_absolute() or one.exists()]  # others are hub ids
    folders = {str(path.parent) for path in paths} | {str(path.resolve().parent) for path in paths}
    folders |= {tempfile.gettempdir(), str(Path.home()), str(Path.cwd())}
    longest = sorted(folders - {".", "/"}, key=len, reverse=True)
    known = re.compile(rf"(?<![\w./\\-])(?:{'|'.join(map(re.escape, longest))})[\\/]")

    def hide(text: str) -> str:
        return _FOLDERS.sub("", known.sub("", text))

    return hide
