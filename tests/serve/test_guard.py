"""Who may ask, from where, and how much; and that no answer says more than it should."""

from __future__ import annotations

import base64
import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from latentdiff.errors import UserError
from latentdiff.serve.app import create_app
from latentdiff.serve.engine import Full, Stopping
from latentdiff.serve.guard import hider
from latentdiff.serve.settings import Settings
from tests.serve.serving import client_of, file_of, served, small_model, wait_until

KEY = "the-very-secret"
GENERATIONS, TXT2IMG = "/v1/images/generations", "/sdapi/v1/txt2img"
ASKED = {"prompt": "a cat", "steps": 1}
NOISE = file_of(np.random.default_rng(0).integers(0, 256, (32, 32, 3)))


@pytest.fixture(scope="module")
def client(model: str) -> Iterator[TestClient]:
    with client_of(model, max_body=100_000, max_pixels=64 * 64) as client:
        yield client


@pytest.fixture(scope="module")
def locked(model: str) -> Iterator[TestClient]:
    origins = ("https://example.org/", "http://other.test:81")
    with client_of(model, api_key=KEY, allow_origins=origins) as client:
        yield client


def routes(client: TestClient) -> list[tuple[str, str]]:
    schema = client.app.openapi()  # type: ignore[attr-defined]
    found = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    return [*found, *(("get", path) for path in ("/", "/openapi.json", "/no/such", "/v1/no"))]


# Keys


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "given",
    [
        *(None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", "Bearer \xff", KEY, f"Token {KEY}"),
        *("Basic !", basic(KEY), basic(f"user:{KEY}x"), basic("user:")),
    ],
)
def test_without_the_key_nothing_is_answered(locked: TestClient, given: str | None) -> None:
    headers = {} if given is None else {b"authorization": given.encode("latin-1")}
    for method, path in routes(locked):
        for tried in {method, "get", "post", "options", "delete"}:
            answer = locked.request(tried, path, headers=headers)
            if (tried, path) == ("get", "/v1/images/files/{name}"):
                assert answer.status_code == 404  # who knows a name there may have it
                continue
            assert answer.status_code == 401, (tried, path)
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert KEY not in answer.text


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer  {KEY}", basic(f"any one:{KEY}")])
def test_with_the_key_all_is(locked: TestClient, given: str) -> None:
    for method, path in routes(locked):
        answer = locked.request(method, path, headers={"authorization": given})
        assert answer.status_code not in (401, 403, 500), (method, path)
        assert KEY not in answer.text


# Other sites


@pytest.mark.parametrize("origin", ["https://example.org", "http://other.test:81"])
def test_pages_of_allowed_sites_may_ask(locked: TestClient, origin: str) -> None:
    ask = {"access-control-request-method": "POST"}
    ask |= {"origin": origin, "access-control-request-headers": "authorization,content-type"}
    answer = locked.options(GENERATIONS, headers=ask)
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == origin
    assert "authorization" in answer.headers["access-control-allow-headers"]
    unknown = locked.post(GENERATIONS, json=ASKED, headers={"origin": origin})
    assert unknown.status_code == 401
    assert unknown.headers["access-control-allow-origin"] == origin
    drawn = locked.post(
        GENERATIONS, json=ASKED, headers={"origin": origin, "authorization": f"Bearer {KEY}"}
    )
    assert drawn.status_code == 200 and drawn.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["https://evil.test", "http://example.org", "null", "http://["])
def test_pages_of_others_may_not(locked: TestClient, client: TestClient, origin: str) -> None:
    ask = {"origin": origin, "access-control-request-method": "POST"}
    for one in (locked, client):
        answer = one.options(GENERATIONS, headers=ask)
        assert answer.status_code >= 400
        assert not [name for name in answer.headers if name.startswith("access-control-allow")]
    for one, key in ((locked, {"authorization": f"Bearer {KEY}"}), (client, {})):
        for path, kind in ((GENERATIONS, "application/json"), ("/v1/images/edits", "text/plain")):
            headers = {"origin": origin, "content-type": kind, **key}
            answer = one.post(path, content=json.dumps(ASKED), headers=headers)
            assert answer.status_code == 403, path
            assert "access-control-allow-origin" not in answer.headers
        assert one.get("/health", headers={"origin": origin, **key}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.test", None, "https://example.org"])
def test_caches_keep_answers_of_sites_apart(
    locked: TestClient, client: TestClient, origin: str | None
) -> None:
    headers = {} if origin is None else {"origin": origin}
    for path in ("/health", "/no/such"):
        assert locked.get(path, headers=headers).headers["vary"] == "Origin"
        assert "vary" not in client.get(path, headers=headers).headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://localhost"},
        {"origin": "https://outer.test", "sec-fetch-site": "same-origin"},
    ],
)
def test_own_pages_may_ask(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post(GENERATIONS, json=ASKED, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        *((name, {}, True) for name in ("localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:80")),
        *((name, {}, False) for name in ("evil.test", "localhost.evil.test", "", "[", "10.0.0.1")),
        ("10.0.0.1:80", {"host": "10.0.0.1"}, True),
        ("evil.test", {"host": "10.0.0.1"}, False),
        ("MyBox:80", {"host": "10.0.0.1"}, True),
        ("mybox.local", {"host": "10.0.0.1"}, True),
        ("mybox.office.test", {"host": "10.0.0.1"}, True),
        ("mybox.evil.test", {"host": "10.0.0.1"}, False),
        ("mybox", {}, False),
        ("Outer.test:81", {"allow_origins": ("https://outer.test:81",)}, True),
        ("outer.test", {"allow_origins": ("https://outer.test:81",)}, False),
        ("any.test", {"host": "0.0.0.0"}, True),
        ("any.test", {"api_key": KEY}, True),
    ],
)
def test_foreign_names_of_this_server(
    model: str,
    host: str,
    settings: dict[str, Any],
    allowed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that its owner lets point here is how a web page asks in spite of the browser."""
    monkeypatch.setattr(socket, "gethostname", lambda: "mybox")
    monkeypatch.setattr(socket, "getfqdn", lambda: "mybox.office.test")
    app = create_app(Settings(models=(model,), **settings))
    headers = {"host": host, "authorization": f"Bearer {KEY}"}
    answer = TestClient(app).get("/health", headers=headers)
    assert answer.status_code == (200 if allowed else 403)
    if not allowed:
        remedies = ("localhost", "--api-key", "--allow-origin", "proxy")
        assert all(one in answer.json()["detail"] for one in remedies)


# Proxies


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        ("localhost:7860", {}, True),  # a proxy that asks by the address it was given
        ("evil.test:7860", {}, False),  # a page of that name, which may send all else itself
        ("outer.test", {}, False),
        ("outer.test", {"allow_origins": ("https://outer.test",)}, True),
        ("outer.test", {"api_key": KEY}, True),
    ],
)
@pytest.mark.parametrize("forwarded", ["localhost", "evil.test:7860", "outer.test"])
def test_forwarded_hosts_do_not_hide_a_foreign_name(
    model: str, host: str, settings: dict[str, Any], allowed: bool, forwarded: str
) -> None:
    app = create_app(Settings(models=(model,), trusted_proxies=("testclient",), **settings))
    headers = {"host": host, "x-forwarded-host": forwarded, "authorization": f"Bearer {KEY}"}
    answer = TestClient(app).get("/health", headers=headers)
    assert answer.status_code == (200 if allowed else 403)


@pytest.mark.parametrize("trusted", [True, False])
def test_forwarded_headers_are_believed_of_trusted_proxies(model: str, trusted: bool) -> None:
    headers = {"x-forwarded-host": "outer.test", "x-forwarded-for": "10.9.8.7"}
    proxies = ("testclient",) if trusted else ("10.0.0.0/8",)
    with client_of(model, trusted_proxies=proxies) as client:
        seen: list[str] = []
        engine = client.app.state.server.engine  # type: ignore[attr-defined]
        submit = engine.submit
        engine.submit = lambda who, *rest, **more: seen.append(who) or submit(who, *rest, **more)
        own = {**headers, "origin": "http://outer.test"}
        answer = client.post(GENERATIONS, json=ASKED, headers=own)
        assert answer.status_code == (200 if trusted else 403)
        client.post(GENERATIONS, json=ASKED, headers=headers)
        assert {who.split()[0] for who in seen} == {"10.9.8.7" if trusted else "testclient"}


@pytest.mark.parametrize("prefix", ["", "/paint"])
def test_all_routes_under_a_root_path(model: str, prefix: str) -> None:
    with client_of(model, root_path="/paint/") as client:
        for path in ("/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/api/info"):
            assert client.get(prefix + path).status_code == 200, path
        assert client.post(f"{prefix}{GENERATIONS}", json={}).json()["error"]["param"] == "prompt"
        assert "error" in client.get(f"{prefix}/v1/no").json()


# How much


def many_bytes(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * 10_000


@pytest.mark.parametrize(
    "path", [GENERATIONS, "/v1/images/edits", "/api/inpaint", "/api/settings", TXT2IMG]
)
def test_bodies_that_are_too_large(client: TestClient, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if "edits" in path else "application/json"
    for body in (b" " * 100_001, many_bytes(11)):  # the second says no length
        answer = client.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code == 413 and "100,000" in answer.text, path


@pytest.mark.parametrize("sized", [True, False])
def test_a_large_body_is_not_read_on(model: str, sized: bool) -> None:
    """Of 100 MB no more is taken than the limit and what lies in buffers."""
    with served(model, max_body=100_000) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as line:
            length = "Content-Length: 100000000" if sized else "Transfer-Encoding: chunked"
            start = f"POST /api/inpaint HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
            line.sendall(f"{start}Content-Type: application/json\r\n\r\n".encode())
            piece = b" " * 50_000
            for _ in range(4):
                line.sendall(piece if sized else b"C350\r\n" + piece + b"\r\n")
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += line.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 413") and b"onnection: close" in answer
            with pytest.raises(OSError):
                for _ in range(2000):
                    line.sendall(piece)


def png(width: int, height: int, data: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


BOMBS = {
    "pixels": png(50_000, 50_000, bytes(10_000)),
    "more than allowed": png(65, 64, bytes(64 * 10)),
    "sides": png(2**31 - 1, 2**31 - 1),
    "nothing": png(0, 0),
    "text": png(8, 8, bytes(16), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23)))),
    "profile": png(8, 8, bytes(16), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))),
    "short": png(64, 64, b"")[:50],
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "frames": b"GIF89a" + bytes(20),
}


@pytest.mark.parametrize("bomb", BOMBS, ids=str)
def test_images_that_blow_up(client: TestClient, bomb: str) -> None:
    text = base64.b64encode(BOMBS[bomb]).decode()
    asked = {"prompt": "a cat", "num_inference_steps": 1}
    image = {"image": ("a.png", BOMBS[bomb])}
    edited = client.post("/v1/images/edits", data={"prompt": "a cat", "steps": "1"}, files=image)
    own = client.post("/api/image_to_image", json={**asked, "image": text})
    if bomb in ("text", "profile") and edited.status_code == 200:
        return  # Pillow leaves out what is too long beside the pixels
    assert edited.status_code == 400 and edited.json()["error"]["param"] == "image"
    assert own.status_code == 422 and own.json()["detail"].startswith("image ")
    for path, body in (
        ("img2img", {"init_images": [text]}),
        ("extra-single-image", {"image": text}),
        ("png-info", {"image": text}),
    ):
        answer = client.post(f"/sdapi/v1/{path}", json=body)
        assert answer.status_code == 422 or (path == "png-info" and answer.status_code == 200)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": "a", "guidance": NaN, "guidance_scale": NaN, "cfg_scale": NaN}',
        b'{"prompt": "a", "strength": -Infinity, "seed": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "\\ud83d": 1, "seed": "x"}',
        b'{"prompt": NaN}',
        b"[]",
        b"null",
        b"",
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, "/api/text_to_image", TXT2IMG])
def test_json_that_is_none(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()


def test_validation_names_the_field_and_sends_nothing_back(client: TestClient) -> None:
    asked = {"seed": "9" * 9, "steps": "abc", "num_inference_steps": "x" * 50_000}
    answer = client.post("/api/text_to_image", json=asked)
    assert answer.status_code == 422 and "x" * 100 not in answer.text
    named = {one["loc"][-1] for one in answer.json()["detail"]}
    assert named == {"steps", "num_inference_steps"}


# What answers say

NAMES = [
    "../../../etc/passwd",
    "..\\..\\x",
    "/etc/passwd",
    "%2e%2e/%2e%2e/x",
    "a\0b",
    "CON",
    "~root",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(model: str, client: TestClient, name: str) -> None:
    from urllib.parse import quote

    folder = str(Path(model).parent)
    answers = [client.post(f"/api/{quote(name, safe='%')}", json={})]
    answers += [client.get(f"{start}{quote(name, safe='%/')}") for start in ("/", "/v1/models/")]
    answers += [client.get(f"/v1/images/files/{quote(name, safe='%')}")]
    for field in ("model", "vae", "sampler", "timestep_spacing", "image"):
        answers.append(client.post("/api/text_to_image", json={field: name}))
    for field in ("model", "sampler", "size", "response_format"):
        answers.append(client.post(GENERATIONS, json={**ASKED, field: name}))
    for field in ("sampler_name", "scheduler", "steps"):
        answers.append(client.post(TXT2IMG, json={field: name}))
    for field in ("sd_model_checkpoint", "sd_vae"):
        answers.append(client.post(TXT2IMG, json={"override_settings": {field: name}}))
        answers.append(client.post("/sdapi/v1/options", json={field: name}))
    for answer in answers:
        failed = 400 <= answer.status_code < 500 or '"event": "error"' in answer.text
        assert failed, answer.text
        assert "root:" not in answer.text and folder not in answer.text


def test_texts_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others" / "sd15").mkdir(parents=True)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "word.pt").touch()
    inside = tmp_path / "my models" / "sd.safetensors"
    settings = Settings(
        models=(str(inside), "others/sd15", "org/name"),
        lora_dir=str(tmp_path / "loras"),
        loras=(f"{tmp_path}/the loras/fur.safetensors:0.7",),
        embeddings=("words/word.pt=<word>",),
    )
    hide = hider(settings)
    for given, left in [
        (f"{inside} cannot be read.", "sd.safetensors cannot be read."),
        (f"'{inside}/unet': no", "'sd.safetensors/unet': no"),
        ("others/sd15/vae is missing", "sd15/vae is missing"),
        (f"there is no a.safetensors in {tmp_path}/loras.", "there is no a.safetensors in loras."),
        (f"({tmp_path}/the loras/fur.safetensors)", "(fur.safetensors)"),
        ("words/word.pt: odd", "word.pt: odd"),
        ("/usr/lib/python3/x.py:3", "x.py:3"),
        (r"C:\Users\me\sd.ckpt, D:/a/b", "sd.ckpt, b"),
        (f"{Path.home()}/.cache/x and ~/y/z", ".cache/x and z"),
        ("org/name, 3/4 and/or a/b/c", "org/name, 3/4 and/or a/b/c"),
        ("see https://example.org/a/b and /docs", "see https://example.org/a/b and /docs"),
    ]:
        assert hide(given) == left


def lost_weights(folder: Path) -> dict[str, Any]:
    next((folder / "small" / "unet").glob("*.safetensors")).write_bytes(b"no weights")
    return {}


def lost_model(folder: Path) -> dict[str, Any]:
    (folder / "small" / "unet" / "config.json").unlink()
    return {}


def no_lora(folder: Path) -> dict[str, Any]:
    (folder / "loras").mkdir()
    (folder / "loras" / "bad.safetensors").write_bytes(b"no weights")
    return {"lora_dir": str(folder / "loras")}


def lost_output(folder: Path) -> dict[str, Any]:
    return {"output": folder / "images"}


@pytest.mark.parametrize("damage", [lost_weights, lost_model, no_lora, lost_output])
def test_no_answer_says_where_the_server_has_its_files(
    tmp_path: Path, damage: Callable[[Path], dict[str, Any]]
) -> None:
    folder = tmp_path / "the folder"
    with client_of(small_model(folder / "small"), **damage(folder)) as client:
        if damage is lost_output:
            (folder / "images").rmdir()
            (folder / "images").write_text("in the way")
        for name in ("bad", "none"):
            prompt = f"a cat <lora:{name}:1>"
            answers = [
                client.post("/api/text_to_image", json={"prompt": prompt}),
                client.post(GENERATIONS, json={**ASKED, "prompt": "a cat"}),
                client.post(TXT2IMG, json={"prompt": prompt, "steps": 1}),
            ]
            answers += [client.get(path) for method, path in routes(client) if method == "get"]
            for answer in answers:
                assert "the folder" not in answer.text and str(tmp_path) not in answer.text


def test_of_what_nobody_thought_of_the_log_says_more(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("in /home/me/secret")

    engine = client.app.state.server.engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "submit", fails)
    for path in (GENERATIONS, "/api/text_to_image"):
        answer = client.post(path, json={"prompt": "a cat"})
        assert answer.status_code == 500
        assert "secret" not in answer.text and "RuntimeError" not in answer.text
    with pytest.raises(RuntimeError, match="secret"):  # for the server's log
        TestClient(client.app, base_url="http://localhost").post(GENERATIONS, json=ASKED)


@pytest.mark.parametrize(("error", "status"), [(Full(7), 429), (Stopping(), 503)])
def test_full_queues_and_servers_that_stop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise error

    engine = client.app.state.server.engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "submit", refuses)
    theirs = client.post(GENERATIONS, json=ASKED)
    own = client.post("/api/text_to_image", json={})
    assert theirs.json()["error"]["message"] == own.json()["detail"] == str(error)
    for answer in (theirs, own):
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == {429: "7", 503: None}[status]


def test_what_is_kept_as_files(model: str, tmp_path: Path) -> None:
    from latentdiff.pipelines.metadata import read

    with client_of(model, output=tmp_path / "images") as client:
        client.post(GENERATIONS, json={**ASKED, "n": 2, "seed": 7})
    files = sorted((tmp_path / "images").iterdir(), key=lambda one: one.name.split("-")[2])
    assert [read(file).settings["seed"] for file in files] == [7, 8]


def test_output_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output"):
        create_app(Settings(models=(model,), output=tmp_path / "file" / "images"))


def test_figures(model: str) -> None:
    with client_of(model) as client:
        client.post(GENERATIONS, json={**ASKED, "n": 3})
        client.post(GENERATIONS, json={})
        client.get("/no/such")
        text = client.get("/metrics").text
        route = f'latentdiff_requests_total{{route="{GENERATIONS}",status='
        for line in (
            f'{route}"200"}} 1.0',
            f'{route}"400"}} 1.0',
            'latentdiff_requests_total{route="",status="404"} 1.0',
            "latentdiff_images_total 3.0",
            "latentdiff_waiting_images 0.0",
            "latentdiff_loaded_models 1.0",
        ):
            assert line in text.splitlines()
        assert "/no/such" not in text  # or everyone could add to it


def test_the_page_of_routes_needs_no_network(client: TestClient) -> None:
    page = client.get("/docs").text
    schema = client.get("/openapi.json").json()
    assert "src=" not in page and "//" not in page.replace("<!--", "")
    for path in schema["paths"]:
        assert path in page
    assert "<code>steps</code>" in page


# Clients that go away

BIG = {"num_inference_steps": 150, "num_images": 8}
EDIT = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    + NOISE
    + b'\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat'
    + b'\r\n--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n150\r\n--x--\r\n'
)
JOBS = {
    "openai": (GENERATIONS, json.dumps({"prompt": "a cat", "n": 8, "steps": 150}).encode()),
    "stream": (
        GENERATIONS,
        json.dumps({"prompt": "a cat", "n": 8, "steps": 150, "stream": True}).encode(),
    ),
    "edit": ("/v1/images/edits", EDIT),
    "page": ("/api/text_to_image", json.dumps(BIG).encode()),
    "a1111": (
        "/sdapi/v1/txt2img",
        json.dumps({"steps": 150, "batch_size": 8, "width": 32, "height": 32}).encode(),
    ),
}


@pytest.fixture(scope="module")
def running(model: str) -> Iterator[tuple[str, Any]]:
    with served(model) as (address, app):
        yield address, app


@pytest.mark.parametrize("protocol", JOBS)
def test_a_client_that_goes_away_is_cancelled(running: tuple[str, Any], protocol: str) -> None:
    address, app = running
    path, body = JOBS[protocol]
    if path not in app.openapi()["paths"] and protocol == "a1111":
        pytest.skip("not spoken")
    engine = app.state.server.engine
    made = engine.made
    host, port = address.removeprefix("http://").split(":")
    kind = "multipart/form-data; boundary=x" if protocol == "edit" else "application/json"
    with socket.create_connection((host, int(port))) as line:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.running)
        [job] = engine.running
    wait_until(lambda: job.ended)
    assert not job.made and engine.made == made
    wait_until(lambda: not engine.running)


def test_no_other_site_frames_the_page(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"] == "no-cache" and "etag" in answer.headers
