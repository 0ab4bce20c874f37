"""Random requests: each is answered, none of them by a fault of the server.

LATENTDIFF_FUZZ=10000 has that many tried instead of 500.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentdiff.serve.engine import Engine, Job
from tests.serve.serving import file_of, served, small_model

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("LATENTDIFF_FUZZ", "500"))
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 4))
PNG = file_of(PIXELS)
PICTURE = base64.b64encode(PNG).decode()
#: Requests that are right, from which the random ones are made.
OPENAI = {
    "prompt": "a cat",
    "model": "small",
    "n": 1,
    "size": "32x32",
    "response_format": "b64_json",
    "output_format": "png",
    "stream": False,
    "partial_images": 0,
    "negative_prompt": "",
    "seed": 1,
    "steps": 1,
    "guidance": 2.0,
    "sampler": "euler",
}
OWN = {
    "prompt": "a cat",
    "negative_prompt": "dog",
    "prompt_syntax": "a1111",
    "model": "small",
    "seed": "1",
    "num_images": 1,
    "guidance_scale": 2.0,
    "previews": True,
    "num_inference_steps": 1,
    "guidance_rescale": 0.0,
    "sampler": "ddim",
    "timestep_spacing": "leading",
    "clip_skip": 0,
}
IMAGE = {"image": PICTURE, "strength": 1.0}
SIZE = {"width": 32, "height": 32}
A1111 = {
    **SIZE,
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": 1,
    "steps": 1,
    "cfg_scale": 2,
    "batch_size": 1,
    "n_iter": 1,
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "styles": [],
    "override_settings": {"sd_model_checkpoint": "small"},
    "send_images": True,
    "save_images": False,
}
HIRES = {"enable_hr": False, "hr_scale": 2, "denoising_strength": 0.5, "hr_upscaler": "Latent"}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/images/generations": OPENAI,
    "/v1/images/edits": {**OPENAI, "strength": 1.0},
    "/api/text_to_image": {**OWN, **SIZE, "hires_scale": None, "hires_strength": 0.5},
    "/api/image_to_image": {**OWN, **IMAGE},
    "/api/inpaint": {
        **OWN,
        **IMAGE,
        "mask_image": PICTURE,
        "mask_blur": 0,
        "padding_mask_crop": None,
    },
    "/api/outpaint": {**OWN, **IMAGE, "left": 8, "right": 0, "top": 0, "bottom": 0},
    "/api/variations": {**OWN, **IMAGE},
    "/api/upscale": {**OWN, "image": PICTURE, "scale": 2.0},
    "/api/restore": {**OWN, "image": PICTURE, "kind": "denoise", "noise": 0.1},
    "/api/colorize": {**OWN, "image": PICTURE},
    "/sdapi/v1/txt2img": {**A1111, **HIRES},
    "/sdapi/v1/img2img": {
        **A1111,
        "init_images": [PICTURE],
        "mask": PICTURE,
        "denoising_strength": 0.5,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "inpaint_full_res_padding": 0,
        "inpainting_mask_invert": 0,
        "resize_mode": 0,
    },
    "/sdapi/v1/extra-single-image": {
        "image": PICTURE,
        "resize_mode": 0,
        "upscaling_resize": 2,
        "upscaler_1": "Lanczos",
    },
    "/sdapi/v1/png-info": {"image": PICTURE},
    "/sdapi/v1/options": {"sd_model_checkpoint": "small", "CLIP_stop_at_last_layers": 1},
    "/sdapi/v1/interrupt": {},
}
ODD_TEXTS = (
    *("", " ", "-1", "1e400", "NaN", "null", "\0", "\ud83d", "é\u202e", "a" * 40_000, "%s{0}"),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "<lora:x:1>",
        "<lora:../x:nan>",
        "<lora:",
        "(" * 99,
    ),
    *("(a:1e999)", "BREAK", "{a|b}", "__x__", "33x17", "64x64", "9999x9999", "url", "data:,", "="),
    *("data:image/png;base64,", PICTURE[:80], PICTURE, base64.b64encode(b"GIF89a").decode()),
)
ODD_NUMBERS = (0, -1, 1, 2, 7, 33, 64, 2**31, 2**53, 2**63, 2**64, -(2**70), 10**400)
ODD_REALS = (0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"))
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(ODD_NUMBERS)
    | st.integers()
    | st.sampled_from(ODD_REALS)
    | st.floats()
    | st.sampled_from(ODD_TEXTS)
    | st.text(max_size=20)
)
VALUES = SCALARS | st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def requests_like(right: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A right request with a few fields that are anything, are not there, or are new."""
    names = st.sampled_from(sorted(right)) if right else st.just("x")
    changed = st.dictionaries(names | st.text(max_size=8), VALUES, max_size=3)
    gone = st.sets(names, max_size=2)
    return st.builds(
        lambda changes, without: {
            name: value for name, value in {**right, **changes}.items() if name not in without
        },
        changed,
        gone,
    )


def bodies_like(right: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The same as JSON, some of it cut off or not JSON at all."""
    whole = requests_like(right).map(lambda asked: json.dumps(asked).encode())
    cut = st.builds(lambda body, at: body[: at % (len(body) + 1)], whole, st.integers(0))
    return st.one_of(whole, whole, whole, cut, VALUES.map(lambda one: json.dumps(one).encode()))


Server = tuple[str, httpx.Client, set[str], str]
"""Its address, a client, its routes, and where its files are."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("the folder")
    (folder / "loras").mkdir()
    submit = Engine.submit

    def quick(self: Engine, who: str, orders: Any, **more: Any) -> Job:
        for order in orders:
            order.arguments.setdefault("num_inference_steps", 1)
        return submit(self, who, orders, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", quick)
        limits = {"max_pixels": 64 * 64, "max_steps": 1, "max_waiting": 4, "max_body": 200_000}
        model = small_model(folder / "small")
        with (
            served(model, lora_dir=str(folder / "loras"), **limits) as (address, app),
            httpx.Client(base_url=address, timeout=60) as client,
        ):
            yield address, client, set(app.openapi()["paths"]), str(folder)


def check(answer: Any, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """That a server may answer so. Its log must be empty: there it would say what has failed."""
    text = answer.text
    assert answer.status_code < 500, text
    assert folder not in text and "Traceback" not in text and "server failed" not in text
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR], caplog.text


def random(part: float) -> settings:
    """That share of the requests; the same ones each time, unless more are asked for."""
    return settings(
        max_examples=max(1, round(COUNT * part)),
        derandomize=COUNT == 500,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("path", RIGHT)
def test_requests_that_are_nearly_right(
    server: Server, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    _, client, known, folder = server
    if path.startswith("/sdapi") and path not in known:
        pytest.skip("not spoken")
    form = path == "/v1/images/edits"
    files = st.sampled_from([PNG, PNG[:100], b"", b"GIF89a", file_of(PIXELS[:9, :65])])
    names = st.sampled_from(["image", "image[]", "mask", "x"])

    @random(0.7 / len(RIGHT))
    @given(
        asked=requests_like(RIGHT[path]) if form else bodies_like(RIGHT[path]),
        more=st.lists(st.tuples(names, files), max_size=3) if form else st.none(),
    )
    def one(asked: Any, more: Any) -> None:
        if form:
            data = {name: _field(value) for name, value in asked.items()}
            answer = client.post(path, data=data, files=more or [("image", PNG)])
        else:
            kind = {"content-type": "application/json"}
            answer = client.post(path, content=asked, headers=kind)
        check(answer, folder, caplog)

    one()


def _field(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


def test_the_requests_that_others_are_made_from_are_right(
    server: Server,
) -> None:
    _, client, known, _ = server
    for path, asked in RIGHT.items():
        if path.startswith("/sdapi") and path not in known:
            continue
        if path == "/v1/images/edits":
            data = {name: _field(value) for name, value in asked.items()}
            answer = client.post(path, data=data, files={"image": PNG})
        else:
            answer = client.post(path, json=asked)
        assert answer.status_code == 200 and '"event": "error"' not in answer.text, (
            path,
            answer.text[:500],
        )


def test_requests_from_the_schema(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """All routes, by schemathesis, from what the server itself says of them."""
    import schemathesis

    address, _, _, folder = server
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:

        @random(0.3 / len(operations))
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            check(case.call(), folder, caplog)

        one()
