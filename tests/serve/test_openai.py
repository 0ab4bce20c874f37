"""OpenAI's image protocol: what is drawn, what is answered, and what its clients make of that."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.serve.engine import Job, Stopping
from latentdiff.serve.files import Links
from tests.serve.serving import client_of, file_of, pixels_of, served

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ASKED = {"prompt": "a cat", "steps": 2, "seed": 5}
WEAK = {"guidance_scale": 1.5}
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3))


@pytest.fixture(scope="module")
def client(model: str) -> Iterator[TestClient]:
    with client_of(model) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(model: str) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(model)


def images_in(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [pixels_of(base64.b64decode(one["b64_json"])) for one in answer.json()["data"]]


def same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and abs(one - other).max() <= 1


# Text to image


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"size": "auto", "negative_prompt": None, "sampler": None, "guidance": None}, {}),
        ({"steps": 3, "size": "48x32"}, {"num_inference_steps": 3, "width": 48, "height": 32}),
        ({"guidance": 1.5, "negative_prompt": "dog"}, {"negative_prompt": "dog"} | WEAK),
        ({"cfg_scale": 1.5}, WEAK),
        ({"guidance_scale": 1.5}, WEAK),
        ({"sampler": "Euler a"}, {"sampler": "euler_ancestral"}),
        ({"prompt": "(cat:1.5) " * 9}, {"prompt": "(cat:1.5) " * 9}),
    ],
)
@pytest.mark.filterwarnings("ignore:the prompt holds")
def test_fields_say_what_is_drawn(
    client: TestClient,
    pipeline: LatentDiffusionPipeline,
    fields: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    [drawn] = images_in(client.post(GENERATIONS, json={**ASKED, **fields}))
    call = {"prompt": "a cat", "num_inference_steps": 2, **arguments}
    [expected] = pipeline(seed=5, prompt_syntax="long", progress=False, **call).images
    assert same(drawn, np.asarray(expected).astype(int))


def test_steps_by_their_other_name(client: TestClient) -> None:
    given = {"prompt": "a cat", "seed": 5}
    named = [{"steps": 3}, {"num_inference_steps": 3}, {"steps": 2}]
    drawn = [images_in(client.post(GENERATIONS, json={**given, **one}))[0] for one in named]
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", ["url", "b64_json", None])
def test_every_image_comes_in_the_format_asked_for(client: TestClient, kind: str | None) -> None:
    asked = {**ASKED, "n": 2} | ({} if kind is None else {"response_format": kind})
    answer = client.post(GENERATIONS, json=asked).json()
    assert type(answer["created"]) is int and "usage" not in answer
    assert answer["seeds"] == [5, 6] and answer["size"] == "32x32"
    key = kind or "b64_json"
    assert [list(entry) for entry in answer["data"]] == [[key]] * 2
    if kind == "url":
        files = [client.get(entry["url"]) for entry in answer["data"]]
        assert {one.headers["content-type"] for one in files} == {"image/png"}
        first, second = (pixels_of(one.content) for one in files)
    else:
        first, second = (pixels_of(base64.b64decode(e["b64_json"])) for e in answer["data"])
    assert not same(first, second)
    [alone] = images_in(client.post(GENERATIONS, json={**ASKED, "seed": 6}))
    assert same(alone, second)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_file_formats(client: TestClient, kind: str) -> None:
    answer = client.post(GENERATIONS, json={**ASKED, "output_format": kind}).json()
    assert answer["output_format"] == kind
    content = base64.b64decode(answer["data"][0]["b64_json"])
    with Image.open(BytesIO(content)) as image:
        assert image.format == kind.upper() and image.size == (32, 32)


def test_fields_without_effect_and_names_of_others_are_warned_of(client: TestClient) -> None:
    asked = {**ASKED, "quality": "hd", "style": "vivid", "background": "auto", "user": None}
    warnings = client.post(GENERATIONS, json={**asked, "foo": 1, "model": "dall-e-3"}).json()
    assert [one.split("'")[1] for one in warnings["warnings"][:3]] == ["quality", "style", "foo"]
    assert "dall-e-3" in warnings["warnings"][3] and "small" in warnings["warnings"][3]
    assert client.post(GENERATIONS, json={**ASKED, "model": "small"}).json()["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": "many"}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "0x8"}, "size"),
        ({"size": "33x32"}, "size"),
        ({"size": "32x33"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"response_format": "x"}, "response_format"),
        ({"output_format": "svg"}, "output_format"),
        ({"model": "none"}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"sampler": "NoSuch"}, "sampler"),
        ({"steps": "abc"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"guidance": 1e9}, "guidance"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -2}, "seed"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "\ud83d"}, "prompt"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_theirs(
    client: TestClient, changes: dict[str, Any], param: str | None
) -> None:
    body = json.dumps({**ASKED, **changes}).encode()
    answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"].startswith(param or "") or param in ("n", "model")


@pytest.mark.parametrize("name", ["steps", "num_inference_steps"])
def test_errors_name_the_field_as_the_client_does(client: TestClient, name: str) -> None:
    for stream in (False, True):
        asked = {"prompt": "a cat", name: 10**6, "stream": stream}
        error = client.post(GENERATIONS, json=asked).json()["error"]
        assert error["param"] == name
        assert error["message"] == f"{name} may be 150; got 1000000."


@pytest.mark.parametrize("body", [b"{", b'{"prompt": "a cat", "size" 5}', b'["a"', b"1 2"])
def test_json_that_is_broken_is_no_field(client: TestClient, body: bytes) -> None:
    answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] is None
    assert error["message"].startswith("body: ")


@pytest.mark.parametrize(
    ("failed", "kind", "message"),
    [
        (UserError("width must be a multiple of 2; got 33."), "invalid_request_error", "size: "),
        (UserError("image height and width must be 2."), "invalid_request_error", "size: "),
        (Stopping(), "server_error", "the server is stopping"),
        (RuntimeError("in /home/me"), "server_error", "the server failed; its log says of what."),
    ],
)
def test_streams_end_with_an_error_in_words(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, failed: Exception, kind: str, message: str
) -> None:
    engine = client.app.state.server.engine  # type: ignore[attr-defined]

    def submit(who: str, orders: Any, **_: Any) -> Job:
        job = Job(who, orders, previews=False)
        job.finish(failed)
        return job

    monkeypatch.setattr(engine, "submit", submit)
    lines = client.post(GENERATIONS, json={**ASKED, "stream": True}).text.splitlines()
    assert lines[0] == "event: error"
    error = json.loads(lines[1].removeprefix("data: "))["error"]
    assert error["type"] == kind and error["message"].startswith(message)
    assert error["param"] == ("size" if kind == "invalid_request_error" else None)
    own = json.loads(client.post("/api/text_to_image", json={"prompt": "a cat"}).text)
    assert own == {"event": "error", "message": error["message"].removeprefix("size: ")}


# Edits


def mask_of(painted: Any, colour: int = 0) -> bytes:
    """OpenAI's mask: clear where `painted` is 255, of a colour that must not matter."""
    colours = np.full((*np.shape(painted), 3), colour)
    return file_of(np.dstack([colours, 255 - np.asarray(painted)]))


def edit(client: TestClient, files: Any, **fields: Any) -> Any:
    return client.post(EDITS, data={**ASKED, **fields}, files=files)


LEFT = np.repeat([[255] * 16 + [0] * 16], 32, axis=0)


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("painted", [LEFT, LEFT // 2], ids=["clear", "half clear"])
def test_clear_parts_of_a_mask_are_painted(
    client: TestClient, pipeline: LatentDiffusionPipeline, painted: Any, colour: int
) -> None:
    files = {"image": file_of(NOISE), "mask": mask_of(painted, colour)}
    [drawn] = images_in(edit(client, files))
    expected = pipeline.inpaint(
        "a cat",
        Image.fromarray(np.uint8(NOISE)),
        Image.fromarray(np.uint8(painted)),
        seed=5,
        num_inference_steps=2,
        prompt_syntax="long",
        progress=False,
    )
    assert same(drawn, np.asarray(expected.images[0]).astype(int))
    assert (drawn[:, 16:] == NOISE[:, 16:]).all() and not same(drawn, NOISE)


def test_a_mask_is_that_of_a1111_turned_round(client: TestClient) -> None:
    files = {"image": file_of(NOISE), "mask": mask_of(LEFT)}
    [drawn] = images_in(edit(client, files, guidance="5"))
    asked = {
        "init_images": [base64.b64encode(file_of(NOISE)).decode()],
        "mask": base64.b64encode(file_of(LEFT)).decode(),
        "denoising_strength": 1,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
        "cfg_scale": 5,
        "sampler_name": "DDIM",
        "scheduler": "DDIM",
        "width": 32,
        "height": 32,
        **ASKED,
    }
    answer = client.post("/sdapi/v1/img2img", json=asked).json()
    assert same(drawn, pixels_of(base64.b64decode(answer["images"][0])))


def test_clear_parts_of_the_image_are_its_mask(client: TestClient) -> None:
    [drawn] = images_in(edit(client, {"image": file_of(np.dstack([NOISE, 255 - LEFT]))}))
    assert (drawn[:, 16:, :3] == NOISE[:, 16:]).all()
    assert not same(drawn[..., :3], NOISE)


def test_an_opaque_image_is_painted_as_a_whole(
    client: TestClient, pipeline: LatentDiffusionPipeline
) -> None:
    files = {"image": file_of(NOISE)}
    [drawn] = images_in(edit(client, files, strength="0.6", size="32x32"))
    image = Image.fromarray(np.uint8(NOISE))
    options: Any = {"seed": 5, "num_inference_steps": 2, "prompt_syntax": "long"}
    expected = pipeline.image_to_image("a cat", image, 0.6, progress=False, **options)
    assert same(drawn, np.asarray(expected.images[0]).astype(int))


def test_names_of_the_image(client: TestClient) -> None:
    """Clients call it image, image[] or image[0]."""
    drawn = [
        images_in(edit(client, {name: file_of(NOISE)}))[0]
        for name in ("image", "image[]", "image[0]")
    ]
    assert same(drawn[0], drawn[1]) and same(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ([], {}, "image"),
        ([("image[]", file_of(NOISE))] * 2, {}, "image"),
        ([("image", b"no image")], {}, "image"),
        ([("image", b"")], {}, "image"),
        ([("image", b"%!PS-Adobe-3.0 EPSF-3.0\n")], {}, "image"),
        ([("image", file_of(NOISE)), ("mask", file_of(NOISE))], {}, "mask"),
        ([("image", file_of(NOISE)), ("mask", mask_of(LEFT[:16, :16]))], {}, "mask"),
        ([("image", file_of(NOISE)), ("mask", mask_of(LEFT * 0))], {}, "mask"),
        ([("image", file_of(NOISE)), ("mask", b"")], {}, "mask"),
        ([("image", file_of(NOISE)), *[("mask", mask_of(LEFT))] * 2], {}, "mask"),
        ([("image", file_of(NOISE))], {"size": "64x64"}, "size"),
        ([("image", file_of(NOISE))], {"strength": "2"}, "strength"),
        ([("image", file_of(NOISE))], {"prompt": ""}, "prompt"),
        ([("image", file_of(NOISE))], {"n": "0"}, "n"),
    ],
)
def test_edits_that_cannot_be_done(
    client: TestClient, files: Any, fields: dict[str, str], param: str
) -> None:
    answer = edit(client, files or {"other": b""}, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\n\r\n", b"{}"])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", ""])
def test_forms_that_are_none(client: TestClient, body: bytes, kind: str) -> None:
    answer = client.post(EDITS, content=body, headers={"content-type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


# Links


@pytest.mark.parametrize(
    ("root", "headers", "outer"),
    [
        ("", {}, "http://localhost"),
        ("/paint", {}, "http://localhost/paint"),
        ("", {"x-forwarded-proto": "https"}, "https://localhost"),
        (
            "/paint",
            {"x-forwarded-proto": "https", "x-forwarded-host": "forged.test, example.org:81"},
            "https://example.org:81/paint",
        ),
    ],
)
@pytest.mark.parametrize("trusted", [True, False])
def test_links_begin_with_the_outer_address(
    model: str, root: str, headers: dict[str, str], outer: str, trusted: bool
) -> None:
    proxies = ("testclient",) if trusted else ()
    with client_of(model, root_path=root, trusted_proxies=proxies) as client:
        asked = {**ASKED, "steps": 1, "response_format": "url"}
        [entry] = client.post(GENERATIONS, json=asked, headers=headers).json()["data"]
        start = (outer if trusted else f"http://localhost{root}") + "/v1/images/files/"
        assert entry["url"].startswith(start)
        for path in {"", root}:  # a proxy may leave the prefix, or take it away
            file = client.get(f"{path}/v1/images/files/{entry['url'].removeprefix(start)}")
            assert file.headers["content-type"] == "image/png"


def test_links_end_after_an_hour(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post(GENERATIONS, json={**ASKED, "response_format": "url"}).json()
    link = answer["data"][0]["url"]
    assert client.get(link).status_code == 200
    monkeypatch.setattr("latentdiff.serve.files.KEPT", -1)
    gone = client.get(link)
    assert gone.status_code == 404 and gone.json()["error"]["message"]


def test_links_outlive_their_folder(tmp_path: Path) -> None:
    for links in (Links(None), Links(tmp_path / "links")):
        name = links.keep(b"one", ".png")
        folder = links.find(name).parent  # type: ignore[union-attr]
        shutil.rmtree(folder)
        assert links.find(name) is None
        file = links.find(links.keep(b"two", ".png"))
        assert file is not None and file.read_bytes() == b"two"
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)
        links.close()


def test_links_hold_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.serve.files.MOST", 25)
    links = Links(tmp_path)
    names = [links.keep(b"0123456789", ".png") for _ in range(4)]
    for age, name in enumerate(reversed(names)):
        os.utime(tmp_path / name, (time.time() - age,) * 2) if (tmp_path / name).exists() else None
    (tmp_path / "other.txt").write_text("of someone else " * 9)
    assert [links.find(name) is not None for name in names] == [False, False, True, True]
    assert (tmp_path / "other.txt").exists()


def test_links_need_no_key(model: str) -> None:
    """Pages show them as <img src>, for which browsers send none."""
    with client_of(model, api_key="secret", root_path="/paint") as client:
        asked = {**ASKED, "response_format": "url"}
        key = {"authorization": "Bearer secret"}
        link = client.post(GENERATIONS, json=asked, headers=key).json()["data"][0]["url"]
        assert client.get(link).headers["content-type"] == "image/png"
        for path in ("/v1/images/files/../../models", "/v1/images/files/%2e%2e/%2e%2e/models"):
            assert client.get(path).status_code in (401, 404)
        assert client.post(link).status_code == 401


# Clients


def test_openai_s_own_client(model: str) -> None:
    import openai

    with served(model, api_key="secret") as (address, _):
        their = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert [one.id for one in their.models.list()] == ["small"]
        assert their.models.retrieve("small").id == "small"
        extra = {"seed": 5, "steps": 2}
        drawn = their.images.generate(prompt="a cat", model="small", n=2, extra_body=extra)
        assert drawn.data is not None and len(drawn.data) == 2
        edited = their.images.edit(
            image=("noise.png", file_of(NOISE)),
            mask=("mask.png", mask_of(LEFT)),
            prompt="a cat",
            model="dall-e-2",
            response_format="b64_json",
            extra_body=extra,
        )
        pixels = pixels_of(base64.b64decode(edited.data[0].b64_json or ""))  # type: ignore[index]
        assert (pixels[:, 16:] == NOISE[:, 16:]).all()
        their.images.edit(image=[("one.png", file_of(NOISE))], prompt="a cat", extra_body=extra)
        events = list(
            their.images.generate(
                prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 5, "steps": 4}
            )
        )
        kinds = [f"image_generation.{kind}" for kind in ("partial_image",) * 2 + ("completed",)]
        assert [one.type for one in events] == kinds
        assert [getattr(one, "partial_image_index", None) for one in events] == [0, 1, None]
        [same_one] = their.images.generate(
            prompt="a cat", extra_body={"seed": 5, "steps": 4}
        ).data or [None]
        assert events[-1].b64_json == same_one.b64_json  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError) as wrong:
            their.images.generate(prompt="a cat", model="none")
        assert wrong.value.code == "model_not_found" and wrong.value.param == "model"
        with pytest.raises(openai.APIError, match="multiple"):
            list(their.images.generate(prompt="a cat", stream=True, size="33x33"))  # type: ignore[call-overload]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()


def test_requests_of_open_webui(client: TestClient) -> None:
    """Source: open-webui, backend/open_webui/routers/images.py, engine openai."""
    asked = {"model": "gpt-image-1", "prompt": "a cat", "n": 1, "size": "48x32"}
    for more in ({"response_format": "b64_json"}, {}):  # newer, older
        [image] = images_in(client.post(GENERATIONS, json={**asked, **more, "steps": 1}))
        assert image.shape == (32, 48, 3)
    form = {"model": "", "prompt": "a cat", "n": "1", "response_format": "b64_json"}
    for name in ("image", "image[]"):
        files = [(name, ("image.png", file_of(NOISE), "image/png"))]
        url = f"{EDITS}?api-version=2025-04-01-preview"
        [image] = images_in(client.post(url, data=form, files=files))
        assert image.shape == (32, 32, 3)


def test_requests_of_sillytavern(client: TestClient) -> None:
    """Source: SillyTavern, public/scripts/extensions/stable-diffusion/index.js."""
    asked = {"prompt": "a cat", "model": "dall-e-3", "size": "32x32", "n": 1}
    asked |= {"quality": "standard", "style": "vivid", "response_format": "b64_json"}
    answer = client.post(GENERATIONS, json=asked, headers={"authorization": "Bearer any"})
    assert images_in(answer)[0].shape == (32, 32, 3)
