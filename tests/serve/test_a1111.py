"""A1111's protocol: its names and defaults give the images of the call with the same settings."""

from __future__ import annotations

import base64
import http.client
import io
import json
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import webuiapi
from fastapi.testclient import TestClient
from PIL import Image, ImageFilter, ImageOps
from PIL.Image import Resampling

from latentdiff.errors import UserError
from latentdiff.formats.lora import write_lora
from latentdiff.images import read_texts
from latentdiff.models.low_rank import LowRank
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.metadata import read_parameters
from latentdiff.serve.app import create_app
from latentdiff.serve.settings import Settings
from tests.random_models import make_pipeline
from tests.serve.serving import served, wait_until

URL, LOCAL = "http://127.0.0.1", ("127.0.0.1", 50000)
API = "/sdapi/v1"
FAST: dict[str, Any] = {"steps": 2, "seed": 5, "prompt": "a cat", "sampler_name": "DDIM"}
#: The same for the pipeline, and what A1111 leaves unsaid.
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "seed": 5,
    "prompt": "a cat",
    "sampler": "ddim",
    "timestep_spacing": "leading",
    "guidance_scale": 7.0,
    "prompt_syntax": "a1111",
    "progress": False,
}
EULER = {"sampler": "euler", "timestep_spacing": "linspace"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, an autoencoder, and a LoRA file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    make_pipeline().save_pretrained(folder / "first")
    make_pipeline(seed=1).save_pretrained(folder / "second")
    make_pipeline("tiny").vae.save_pretrained(folder / "vaes" / "other")
    (folder / "loras").mkdir()
    change = LowRank(torch.randn(2, 32), torch.randn(32, 2), 2.0)
    write_lora(
        folder / "loras" / "fur.safetensors", {"unet.mid_block.attentions.0.proj_in": change}
    )
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings(
        models=(str(folder / "first"), str(folder / "second")),
        vaes=(str(folder / "vaes" / "other"),),
        lora_dir=str(folder / "loras"),
        max_pixels=800 * 800,
    )


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url=URL, client=LOCAL) as client:
        yield client


@pytest.fixture(scope="module")
def first(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder / "first")


@pytest.fixture(scope="module")
def second(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder / "second")


def post(client: TestClient, task: str, **asked: Any) -> dict[str, Any]:
    answer = client.post(f"{API}/{task}", json=asked)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def images_of(answer: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in answer["images"]]


def info_of(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer["info"])
    return found


def b64(image: Image.Image, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def array(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def same(got: Image.Image, wanted: Image.Image) -> bool:
    return got.size == wanted.size and int(abs(array(got) - array(wanted)).max()) <= 1


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def square(size: tuple[int, int], *box: int) -> Image.Image:
    """A mask that is white in a box: left, top, right, bottom."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


# Text to image


@pytest.mark.parametrize(
    ("asked", "call"),
    [
        ({}, {}),
        ({"negative_prompt": "a dog"}, {"negative_prompt": "a dog"}),
        ({"cfg_scale": 3}, {"guidance_scale": 3.0}),
        ({"prompt": "a (cat:1.4)"}, {"prompt": "a (cat:1.4)"}),
        ({"width": 48, "height": 24}, {"width": 48, "height": 24}),
        ({"sampler_name": "LMS"}, {"sampler": "lms", "timestep_spacing": "linspace"}),
        ({"scheduler": "SGM Uniform"}, {"timestep_spacing": "trailing"}),
        ({"eta": 0.5}, {"sampler_options": {"eta": 0.5}}),
        ({"eta": 0.5, "sampler_name": "Euler"}, EULER),
        ({"sampler_name": None, "sampler_index": "Euler"}, EULER),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, {"clip_skip": 1}),
        (
            {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.5},
            {"hires_scale": 1.5, "hires_strength": 0.5},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_an_image_is_that_of_the_call(
    asked: Any, call: Any, client: TestClient, first: LatentDiffusionPipeline
) -> None:
    answer = post(client, "txt2img", **FAST | asked)
    assert same(images_of(answer)[0], first(**CALL | call).images[0])
    assert answer["warnings"] == []


@pytest.mark.parametrize(
    "asked", [{}, dict.fromkeys(("prompt", "styles", "override_settings", "mask", "seed", "steps"))]
)
def test_what_is_absent_or_null_is_a1111_s_default(
    asked: Any, client: TestClient, first: LatentDiffusionPipeline
) -> None:
    answer = post(client, "txt2img", **asked)
    call = {
        **CALL,
        **EULER,
        "num_inference_steps": 50,
        "prompt": "",
        "seed": info_of(answer)["seed"],
    }
    assert same(images_of(answer)[0], first(**call).images[0])


def test_a_prompt_asks_for_lora_files(
    client: TestClient, first: LatentDiffusionPipeline, folder: Path
) -> None:
    answer = post(client, "txt2img", **FAST | {"prompt": "a cat <lora:fur:0.7>"})
    wanted = first(**CALL | {"prompt": "a cat <lora:fur:0.7>"}, lora_dir=folder / "loras")
    assert same(images_of(answer)[0], wanted.images[0])
    assert not same(images_of(answer)[0], first(**CALL).images[0])
    assert info_of(answer)["prompt"] == "a cat <lora:fur:0.7>"
    wrong = client.post(f"{API}/txt2img", json=FAST | {"prompt": "<lora:fer:1>"})
    assert wrong.status_code == 422
    assert "<lora:fer:1>" in wrong.text and str(folder) not in wrong.text


@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
def test_picture_k_of_a_request_has_seed_plus_k(sampler: str, client: TestClient) -> None:
    asked = {"steps": 2, "sampler_name": sampler}
    answer = post(client, "txt2img", **asked, seed=100, batch_size=2, n_iter=2)
    images, info = images_of(answer), info_of(answer)
    assert len(images) == 4  # no grid among them
    assert (info["seed"], info["all_seeds"]) == (100, [100, 101, 102, 103])
    assert info["infotexts"] == [one.text["parameters"] for one in images]  # type: ignore[attr-defined]
    assert ["Seed: 102" in text for text in info["infotexts"]] == [False, False, True, False]
    alone = post(client, "txt2img", **asked, seed=102)
    assert same(images_of(alone)[0], images[2])


def test_a_seed_is_drawn_and_said(client: TestClient) -> None:
    answer = post(client, "txt2img", steps=1, seed=-1, batch_size=3)
    info = info_of(answer)
    start = info["seed"]
    assert start >= 0 and info["all_seeds"] == [start, start + 1, start + 2]
    texts = [read_parameters(one.text["parameters"])[2] for one in images_of(answer)]  # type: ignore[attr-defined]
    assert [int(fields["Seed"]) for fields in texts] == info["all_seeds"]
    assert start != info_of(post(client, "txt2img", steps=1))["seed"]


def test_large_seeds_keep_their_digits_or_are_refused(client: TestClient) -> None:
    seen = []
    for seed, count in (
        (3698135662, 1),
        (4294967295, 2),
        (112358132141, 1),
        (8888888888888888888, 1),
    ):
        answer = post(client, "txt2img", steps=1, seed=seed, batch_size=count)
        assert info_of(answer)["all_seeds"] == [seed + k for k in range(count)]
        assert f"Seed: {seed}," in info_of(answer)["infotexts"][0]
        seen.append(images_of(answer)[0].tobytes())
    assert len(set(seen)) == 4
    for seed, count in ((2**64, 1), (2**64 - 1, 2), (-2, 1)):
        answer = client.post(f"{API}/txt2img", json={"steps": 1, "seed": seed, "batch_size": count})
        assert answer.status_code == 422 and "seed" in answer.text


@pytest.mark.parametrize("sampler", [
    {"sampler_name": "DPM++ 2M Karras"},
    {"sampler_name": "DPM++ 2M Karras", "scheduler": "automatic"},
    {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
    {"sampler_name": "DPM++ 2M", "scheduler": "karras"},
    {"sampler_name": "DPM++ 2M", "scheduler": "Automatic"},  # what A1111 means by it
    {"sampler_name": "dpm++ 2m", "scheduler": "automatic"},
])  # fmt: skip
def test_old_and_new_names_of_a_sampler_are_one(
    sampler: Any, client: TestClient, first: LatentDiffusionPipeline
) -> None:
    answer = post(client, "txt2img", **FAST | {"steps": 4} | sampler)
    call = {"num_inference_steps": 4, "sampler": "dpmpp_2m", "timestep_spacing": "karras"}
    assert same(images_of(answer)[0], first(**CALL | call).images[0])
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in info_of(answer)["infotexts"][0]
    assert info_of(answer)["sampler_name"] == "DPM++ 2M"


def test_the_names_of_euler_a_are_one_and_no_other_sampler_stands_in(client: TestClient) -> None:
    names = ("Euler a", "euler_a", "k_euler_a", "EULER A")
    seen = [post(client, "txt2img", **FAST | {"sampler_name": one})["images"] for one in names]
    assert all(one == seen[0] for one in seen)
    for wrong in ({"sampler_name": "NoSuch"}, {"scheduler": "NoSuch"}, {"sampler_index": "NoSuch"}):
        answer = client.post(f"{API}/txt2img", json={"steps": 1, **wrong})
        assert answer.status_code == 422 and "NoSuch" in answer.json()["detail"]


def test_every_listed_sampler_and_schedule_is_taken(client: TestClient) -> None:
    for sampler in client.get(f"{API}/samplers").json():
        answer = post(client, "txt2img", steps=1, sampler_name=sampler["name"])
        assert info_of(answer)["sampler_name"] == sampler["name"]
    for schedule in client.get(f"{API}/schedulers").json():
        seen = [
            post(client, "txt2img", **FAST | {"scheduler": schedule[k]})["images"]
            for k in ("name", "label")
        ]
        assert seen[0] == seen[1]


def test_a_file_says_what_makes_it_again(client: TestClient) -> None:
    asked = FAST | {"sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 3}
    clip = {"override_settings": {"CLIP_stop_at_last_layers": 2}}
    made = post(client, "txt2img", **asked | clip)
    found = post(client, "png-info", image=made["images"][0])
    assert found["info"] == info_of(made)["infotexts"][0]
    fields = found["parameters"]
    assert (fields["Schedule type"], fields["Clip skip"], fields["Prompt"]) == (
        "Karras",
        "2",
        "a cat",
    )
    again = post(
        client,
        "txt2img",
        prompt=fields["Prompt"],
        seed=int(fields["Seed"]),
        steps=int(fields["Steps"]),
        sampler_name=fields["Sampler"],
        scheduler=fields["Schedule type"],
        cfg_scale=float(fields["CFG scale"]),
        override_settings={"CLIP_stop_at_last_layers": int(fields["Clip skip"])},
    )
    assert again["images"] == made["images"]
    plain = post(client, "txt2img", **asked)
    assert plain["images"] != made["images"]
    none = post(client, "png-info", image=b64(noise(8, 8)))
    assert none == {"info": "", "items": {}, "parameters": {}}
    for wrong in ("bm8=", b64(Image.new("1", (5000, 5000)))):  # of more pixels than are decoded
        assert client.post(f"{API}/png-info", json={"image": wrong}).status_code == 422


# What is said about a request


def test_what_has_no_effect_is_named(client: TestClient) -> None:
    asked = {
        "steps": 1,
        "restore_faces": True,
        "subseed_strength": 0.5,
        "no_such": 1,
        "hr_prompt": "x",
    }
    answer = post(client, "txt2img", **asked, override_settings={"odd": 1})
    for warnings in (answer["warnings"], info_of(answer)["warnings"]):
        named = ("restore_faces", "subseed_strength", "no_such", "override_settings.odd")
        assert all(part in str(warnings) for part in named)
        assert not any("hr_prompt" in one for one in warnings)  # no second pass
    hires = {
        "enable_hr": True,
        "hr_upscaler": "Latent",
        "hr_second_pass_steps": 3,
        "hr_prompt": "a dog",
    }
    answer = post(client, "txt2img", **FAST, **hires, width=32, height=32)
    assert sorted(one.split(":")[0] for one in answer["warnings"]) == sorted(hires)[1:]
    answer = post(client, "txt2img", steps=1, save_images=True, send_images=False)
    assert answer["images"] == [] and "save_images" in str(answer["warnings"])


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"steps": "abc"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 100_000}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1000}, "images"),
        ({"width": 100_000}, "width"),
        ({"width": 808, "height": 808}, "808 x 808"),
        ({"enable_hr": True, "hr_scale": 8, "width": 104, "height": 104}, "832 x 832"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"denoising_strength": 1.5}, "denoising_strength"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"sd_model_checkpoint": "../first"}}, "model"),
        ({"override_settings": {"sd_vae": "/etc/passwd"}}, "vae"),
        ({"script_name": "x/y plot"}, "x/y plot"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, "ControlNet"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(
    asked: Any, named: str, client: TestClient, folder: Path
) -> None:
    answer = client.post(f"{API}/txt2img", json={"steps": 1, **asked})
    assert answer.status_code == 422
    assert named in json.dumps(answer.json()["detail"])
    assert str(folder) not in answer.text


def test_halves_of_characters_fail_nothing(client: TestClient) -> None:
    kind = {"Content-Type": "application/json"}
    body = b'{"steps": 1, "prompt": "\\ud83d"}'
    answer = client.post(f"{API}/txt2img", content=body, headers=kind)
    assert (answer.status_code, answer.json()["parameters"]["prompt"]) == (200, "?")
    for body in (b'{"\\ud83d": 1}', b'{"alwayson_scripts": {"\\ud83d": 1}}'):
        assert client.post(f"{API}/txt2img", content=body, headers=kind).status_code == 422


def test_images_are_not_sent_or_echoed(client: TestClient) -> None:
    asked = {**FAST, "batch_size": 2, "n_iter": 2, "send_images": False}
    given = b64(noise(200, 160))  # of 96 kB
    mask = b64(square((200, 160), 0, 0, 8, 8))
    for task, more in (("txt2img", {}), ("img2img", {"init_images": [given], "mask": mask})):
        answer = client.post(f"{API}/{task}", json={**asked, **more})
        assert answer.json()["images"] == [] and len(info_of(answer.json())["all_seeds"]) == 4
        assert len(answer.content) < 8000
        assert not {"init_images", "mask"} & answer.json()["parameters"].keys()


def test_files_are_not_held_while_a_job_waits(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the body itself, of which FastAPI does not let go."""
    held: list[int] = []

    async def finished(request: Any, job: Any) -> None:
        held.append(tracemalloc.get_traced_memory()[0])
        raise UserError("done")

    monkeypatch.setattr("latentdiff.serve.a1111.finished", finished)
    long = base64.b64encode(base64.b64decode(b64(noise(32, 32))) + bytes(3_000_000)).decode()
    mask = base64.b64encode(base64.b64decode(b64(square((32, 32), 0, 0, 8, 8))) + bytes(3_000_000))
    asked = {**FAST, "init_images": [long], "mask": mask.decode()}
    body = json.dumps(asked).encode()
    kind = {"content-type": "application/json"}
    tracemalloc.start()
    try:
        client.post(f"{API}/img2img", content=body, headers=kind)
    finally:
        tracemalloc.stop()
    assert held[0] < 1.2 * len(body)


# Names of models


def test_lists_have_the_keys_that_clients_read(client: TestClient, folder: Path) -> None:
    keys = {
        "sd-models": {"title", "model_name", "hash", "sha256", "filename", "config"},
        "sd-vae": {"model_name", "filename"},
        "samplers": {"name", "aliases", "options"},
        "schedulers": {"name", "label", "aliases", "default_rho", "need_inner_model"},
        "upscalers": {"name", "model_name", "model_path", "model_url", "scale"},
        "loras": {"name", "alias", "path", "metadata"},
    }
    for path, wanted in keys.items():
        answer = client.get(f"{API}/{path}")
        assert answer.status_code == 200 and answer.json(), path
        assert all(one.keys() == wanted for one in answer.json()), path
        assert str(folder) not in answer.text
    for path in (
        "options",
        "cmd-flags",
        "progress",
        "scripts",
        "latent-upscale-modes",
        "prompt-styles",
    ):
        assert client.get(f"{API}/{path}").status_code == 200, path
    titles = [one["title"] for one in client.get(f"{API}/sd-models").json()]
    assert client.get(f"{API}/options").json()["sd_model_checkpoint"] == titles[0]
    assert [one["name"] for one in client.get(f"{API}/loras").json()] == ["fur"]


def test_a_model_is_named_for_one_request(
    client: TestClient, first: LatentDiffusionPipeline, second: LatentDiffusionPipeline
) -> None:
    model = client.get(f"{API}/sd-models").json()[1]
    wanted = second(**CALL).images[0]
    for name in (model["title"], model["model_name"], model["hash"]):
        answer = post(client, "txt2img", **FAST, override_settings={"sd_model_checkpoint": name})
        assert same(images_of(answer)[0], wanted)
        assert (info_of(answer)["sd_model_name"], info_of(answer)["sd_model_hash"]) == (
            "second",
            model["hash"],
        )
        assert same(images_of(post(client, "txt2img", **FAST))[0], first(**CALL).images[0])


def test_an_autoencoder_is_named_for_one_request(client: TestClient, folder: Path) -> None:
    other = LatentDiffusionPipeline.from_pretrained(folder / "first", vae=folder / "vaes" / "other")
    size = {"width": 32, "height": 32}
    answer = post(client, "txt2img", **FAST, **size, override_settings={"sd_vae": "other"})
    assert same(images_of(answer)[0], other(**CALL, **size).images[0])
    own = [post(client, "txt2img", **FAST, override_settings={"sd_vae": name})["images"]
           for name in (None, "Automatic", "None")]  # fmt: skip
    assert own == [post(client, "txt2img", **FAST)["images"]] * 3


def test_options_are_what_later_requests_begin_from(
    settings: Settings, first: LatentDiffusionPipeline, second: LatentDiffusionPipeline
) -> None:
    with TestClient(create_app(settings), base_url=URL, client=LOCAL) as client:
        # As Open WebUI does: all that GET said, with another model.
        options = client.get(f"{API}/options").json()
        options["sd_model_checkpoint"] = client.get(f"{API}/sd-models").json()[1]["title"]
        assert post(client, "options", **options, odd=1) == {
            "warnings": ["unknown, without effect: odd"]
        }
        assert (
            client.get(f"{API}/options").json()["sd_model_checkpoint"]
            == options["sd_model_checkpoint"]
        )
        assert same(images_of(post(client, "txt2img", **FAST))[0], second(**CALL).images[0])
        own = {"override_settings": {"sd_model_checkpoint": "first"}}
        assert same(images_of(post(client, "txt2img", **FAST, **own))[0], first(**CALL).images[0])
        post(client, "options", CLIP_stop_at_last_layers=2)
        answer = post(client, "txt2img", **FAST)
        assert same(images_of(answer)[0], second(**CALL, clip_skip=1).images[0])
        wrong = client.post(f"{API}/options", json={"sd_model_checkpoint": "none"})
        assert wrong.status_code == 422 and "second" in wrong.text
        assert client.post(f"{API}/unload-checkpoint").json() == {}
        assert post(client, "txt2img", **FAST)["images"] == answer["images"]


def test_options_are_set_from_here_or_with_a_key(settings: Settings, tmp_path: Path) -> None:
    def codes(client: Any, **changes: Any) -> list[int]:
        app = create_app(replace(settings, **changes))
        with TestClient(app, base_url=URL, client=client, headers=key) as asking:
            answers = [
                asking.post(f"{API}/{path}", json={"sd_model_checkpoint": "second"})
                for path in ("options", "unload-checkpoint")
            ]
            now = asking.get(f"{API}/options").json()["sd_model_checkpoint"]
        assert now.startswith("second" if answers[0].status_code == 200 else "first")
        return [one.status_code for one in answers]

    key: dict[str, str] = {}
    there = ("192.0.2.7", 50000)
    assert codes(there) == [403, 403]
    assert codes(LOCAL) == codes(("::1", 50000)) == [200, 200]
    assert codes(LOCAL, links=tmp_path / "links") == [409, 200]  # one of several replicas
    key = {"Authorization": "Bearer word"}
    assert codes(there, api_key="word") == [200, 200]


def test_clients_at_the_same_time_do_not_disturb_each_other(
    client: TestClient, first: LatentDiffusionPipeline, second: LatentDiffusionPipeline
) -> None:
    def ask(k: int) -> Any:
        if k == 4:
            return [client.get(f"{API}/options").status_code for _ in range(20)]
        model = {"sd_model_checkpoint": ("first", "second")[k % 2]}
        return post(client, "txt2img", **FAST | {"seed": k, "override_settings": model})

    with ThreadPoolExecutor(5) as pool:
        *answers, codes = pool.map(ask, range(5))
    assert codes == [200] * 20
    for k, answer in enumerate(answers):
        pipeline = (first, second)[k % 2]
        assert same(images_of(answer)[0], pipeline(**CALL | {"seed": k}).images[0])


# Image to image


def test_an_image_is_drawn_anew(client: TestClient, first: LatentDiffusionPipeline) -> None:
    given = noise(40, 32)
    for data in (b64(given), f"data:image/png;base64,{b64(given)}"):
        answer = post(client, "img2img", **FAST, init_images=[data])
        wanted = first.image_to_image(image=given, strength=0.75, **CALL).images[0]
        assert same(images_of(answer)[0], wanted)
    answer = post(client, "img2img", **FAST, init_images=[b64(given)], denoising_strength=0)
    assert (array(images_of(answer)[0]) == array(given)).all()


@pytest.mark.parametrize("size", [(65, 50), (100, 61)])
@pytest.mark.parametrize("full", [True, False])
def test_sides_need_not_be_multiples_of_8(
    size: tuple[int, int], full: bool, client: TestClient
) -> None:
    given, mask = noise(*size), square(size, 20, 10, 37, 29)
    answer = post(client, "img2img", **FAST, init_images=[b64(given)])
    assert images_of(answer)[0].size == size
    masked = {"mask": b64(mask), "mask_blur": 0, "inpaint_full_res": full}
    answer = post(client, "img2img", **FAST, init_images=[b64(given)], **masked)
    changed = (array(images_of(answer)[0]) != array(given)).any(2)
    assert images_of(answer)[0].size == size and changed.any()
    assert not changed[array(mask) == 0].any()


@pytest.mark.parametrize(
    ("mode", "fitted"),
    [
        (0, lambda one: one.resize((24, 32), Resampling.LANCZOS)),
        (1, lambda one: ImageOps.fit(one, (24, 32), Resampling.LANCZOS)),
    ],
)
def test_an_image_is_resized_first(
    mode: int, fitted: Any, client: TestClient, first: LatentDiffusionPipeline
) -> None:
    given, mask = noise(48, 32), square((48, 32), 8, 8, 30, 30)
    resized = {"width": 24, "height": 32, "resize_mode": mode, "init_images": [b64(given)]}
    answer = post(client, "img2img", **FAST, **resized)
    wanted = first.image_to_image(image=fitted(given), strength=0.75, **CALL)
    assert same(images_of(answer)[0], wanted.images[0])
    masked = {"mask": b64(mask), "inpaint_full_res": False, "inpainting_fill": 1, "mask_blur": 2}
    answer = post(client, "img2img", **FAST, **resized, **masked)
    call = {"mask_image": fitted(mask), "strength": 0.75, "mask_blur": 2}
    assert same(images_of(answer)[0], first.inpaint(image=fitted(given), **call, **CALL).images[0])


def test_an_image_is_filled_up_with_its_edges(client: TestClient) -> None:
    given = noise(16, 32)
    asked = {"width": 32, "height": 32, "resize_mode": 2, "denoising_strength": 0}
    answer = post(client, "img2img", **FAST, **asked, init_images=[b64(given)])
    wanted = np.pad(array(given), ((0, 0), (8, 8), (0, 0)), "edge")
    assert (array(images_of(answer)[0]) == wanted).all()


@pytest.mark.parametrize(
    ("asked", "call"),
    [
        ({}, {"fill": True, "padding_mask_crop": 0}),
        ({"inpainting_fill": 1}, {"padding_mask_crop": 0}),
        ({"inpainting_fill": 2}, {"strength": 1.0, "padding_mask_crop": 0}),
        ({"inpaint_full_res_padding": 8}, {"fill": True, "padding_mask_crop": 8}),
        ({"inpaint_full_res": 0, "mask_blur": 0}, {"fill": True, "mask_blur": 0}),
        ({"inpaint_full_res": False, "denoising_strength": 0.4}, {"fill": True, "strength": 0.4}),
    ],
    ids=str,
)
def test_a_mask_is_painted_as_by_the_call(
    asked: Any, call: Any, client: TestClient, first: LatentDiffusionPipeline
) -> None:
    given, mask = noise(64, 48), square((64, 48), 16, 8, 33, 27)
    answer = post(client, "img2img", **FAST, init_images=[b64(given)], mask=b64(mask), **asked)
    call = {"strength": 0.75, "mask_blur": 4, **call}
    wanted = first.inpaint(image=given, mask_image=mask, **CALL, **call).images[0]
    assert same(images_of(answer)[0], wanted)
    kept = array(mask.filter(ImageFilter.MaxFilter(4 * call["mask_blur"] + 1))) == 0
    assert (array(images_of(answer)[0])[kept] == array(given)[kept]).all()


def test_a_mask_may_be_a_list_inverted_clear_or_of_another_size(client: TestClient) -> None:
    given, mask = noise(96, 64), square((96, 64), 16, 16, 48, 32)
    asked = {**FAST, "init_images": [b64(given)], "mask_blur": 0}

    def pixels(**masked: Any) -> bytes:
        return images_of(post(client, "img2img", **asked, **masked))[0].tobytes()

    wanted = pixels(mask=b64(mask))
    clear = Image.new("RGBA", mask.size, (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (16, 16, 48, 32))
    others: list[dict[str, Any]] = [
        {"mask": [b64(mask)]},
        {"mask": f"data:image/png;base64,{b64(mask)}"},
        {"mask": b64(clear)},
        {"mask": b64(mask.resize((48, 32), Resampling.NEAREST))},
        {"mask": b64(ImageOps.invert(mask)), "inpainting_mask_invert": 1},
    ]
    for other in others:
        assert pixels(**other) == wanted, str(other)[:60]
    half = Image.new("RGBA", mask.size, (255, 255, 255, 0))
    half.paste((255, 255, 255, 128), (16, 16, 48, 32))
    grey = mask.point(lambda v: 128 if v else 0)
    assert pixels(mask=b64(half)) == pixels(mask=b64(grey)) != wanted


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        ({"init_images": None}, 404, "Init image not found"),
        ({"init_images": [b64(noise(8, 8))] * 2}, 422, "init_images"),
        ({"init_images": ["bm8="]}, 422, "init_images"),
        ({"init_images": ["/etc/passwd"]}, 422, "init_images"),
        ({"init_images": [b64(noise(8, 8))], "width": 4000, "height": 4000}, 422, "4000 x 4000"),
        ({"mask": b64(square((50, 50), 0, 0, 8, 8))}, 422, "50x50"),
        ({"mask": b64(square((96, 64), 0, 0, 0, 0))}, 422, "black"),
        ({"mask": b64(Image.new("L", (96, 64), 255)), "inpainting_mask_invert": 1}, 422, "black"),
        ({"mask": ["a", "b"]}, 422, "mask"),
        ({"mask": "bm8="}, 422, "mask"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_images_are_refused_by_name(
    asked: Any, code: int, named: str, client: TestClient
) -> None:
    given = {"init_images": [b64(noise(96, 64))]}
    answer = client.post(f"{API}/img2img", json={**FAST, **given, **asked})
    assert (answer.status_code, named in answer.text) == (code, True), answer.text


def test_padding_counts_and_stays_in_the_image(client: TestClient) -> None:
    given, mask = noise(64, 64), square((64, 64), 0, 0, 8, 8)
    asked = {**FAST, "init_images": [b64(given)], "mask": b64(mask), "mask_blur": 0}
    images = [
        images_of(post(client, "img2img", **asked, inpaint_full_res_padding=padding))[0]
        for padding in (0, 32)
    ]
    assert (array(images[0]) != array(images[1])).any()
    for image in images:
        assert (array(image)[array(mask) == 0] == array(given)[array(mask) == 0]).all()


# Larger images


def test_an_image_is_enlarged(client: TestClient) -> None:
    given = noise(17, 23).convert("RGBA")
    given.paste((0, 0, 0, 0), (0, 0, 8, 8))
    for name in [one["name"] for one in client.get(f"{API}/upscalers").json()]:
        answer = post(
            client, "extra-single-image", image=b64(given), upscaler_1=name, upscaling_resize=2
        )
        image = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
        assert image.size == (34, 46) and image.getpixel((4, 4))[3] == 0  # type: ignore[index]
        assert image.getpixel((25, 35))[3] == 255  # type: ignore[index]
        small = image.convert("RGB").crop((24, 24, 34, 46)).resize((5, 11), Resampling.BOX)
        off = abs(array(small) - array(given.convert("RGB").crop((12, 12, 17, 23)))).mean()
        assert off < (2 if name == "latentdiff" else 45)
    size = {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 40}
    batch = {
        "imageList": [{"data": b64(given), "name": "a"}, {"data": b64(noise(20, 10)), "name": "b"}]
    }
    for crop, wanted in ((True, [(40, 40), (40, 40)]), (False, [(40, 54), (80, 40)])):
        answer = post(client, "extra-batch-images", **batch, **size, upscaling_crop=crop)
        assert [one.size for one in images_of(answer)] == wanted
    answer = post(client, "extra-single-image", image=b64(given), gfpgan_visibility=1)
    assert answer["warnings"] == ["gfpgan_visibility: without effect"]
    for wrong in (
        {"upscaler_1": "ESRGAN"},
        {"upscaling_resize": 8, "upscaler_1": "None"},
        {"image": ""},
    ):
        asked = {"image": b64(noise(101, 100)), **wrong}
        assert client.post(f"{API}/extra-single-image", json=asked).status_code == 422


# Real clients


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Of a server on loopback."""
    with served(str(folder)) as (address, _):
        yield int(address.rpartition(":")[2])


def test_webuiapi(port: int, first: LatentDiffusionPipeline) -> None:
    api = webuiapi.WebUIApi(port=port, sampler="DDIM", steps=2)
    asked: dict[str, Any] = {"prompt": "a cat", "seed": 5, "width": 32, "height": 32, "eta": 0.0}
    made = api.txt2img(**asked)
    assert same(made.image, first(**CALL).images[0])
    assert made.info["all_seeds"] == [5] and made.json["warnings"] == []

    given, mask = noise(32, 32), square((32, 32), 8, 8, 24, 24)
    made = api.img2img(images=[given], **asked)
    assert same(made.image, first.image_to_image(image=given, strength=0.75, **CALL).images[0])
    made = api.img2img(images=[given], mask_image=mask, inpainting_fill=1, **asked)
    call: dict[str, Any] = {"strength": 0.75, "mask_blur": 4, "padding_mask_crop": 0, **CALL}
    wanted = first.inpaint(image=given, mask_image=mask, **call)
    assert same(made.image, wanted.images[0])

    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    ram = api.get_memory()["ram"]
    assert ram["total"] == psutil.virtual_memory().total == ram["free"] + ram["used"]
    assert api.skip() == {} == httpx.get(f"{URL}:{port}/internal/ping").json()

    assert api.extra_single_image(image=given, upscaling_resize=2).image.size == (64, 64)
    assert api.png_info(made.image).info == made.info["infotexts"][0]
    assert api.util_get_model_names()[0] == api.util_get_current_model()
    api.util_set_model("second")
    assert api.get_options()["sd_model_checkpoint"] == api.util_get_model_names()[1]
    api.set_options({"sd_model_checkpoint": "first"})


def test_webuiapi_looks_on_and_interrupts(port: int) -> None:
    api = webuiapi.WebUIApi(port=port, sampler="DDIM")
    many = {"steps": 150, "batch_size": 8, "n_iter": 16, "seed": 7, "width": 32, "height": 32}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: api.txt2img(**many))

        seen = list[dict[str, Any]]()

        def shown() -> bool:
            seen.append(api.get_progress())
            return bool(seen[-1]["current_image"])

        try:
            wait_until(shown)
            without = api.custom_get("progress?skip_current_image=true", baseurl=True)
        finally:
            assert api.interrupt() == {}
        made = waiting.result()
    now, state = seen[-1], seen[-1]["state"]
    assert 0 < now["progress"] < 1 and now["eta_relative"] > 0
    assert (state["job_count"], state["sampling_steps"]) == (128, 150)
    assert 0 < state["sampling_step"] <= 150 and not state["interrupted"]
    with Image.open(io.BytesIO(base64.b64decode(now["current_image"]))) as preview:
        preview.load()
    assert without["current_image"] is None and without["state"]["job_count"] == 128
    assert 0 < len(made.images) < 128
    assert made.info["all_seeds"] == [7 + k for k in range(len(made.images))]
    wait_until(lambda: api.get_progress()["state"]["job_count"] == 0)


def test_who_goes_away_is_not_waited_for(port: int) -> None:
    api = webuiapi.WebUIApi(port=port)
    many = json.dumps({"steps": 150, "batch_size": 128, "width": 32, "height": 32})
    gone = http.client.HTTPConnection("127.0.0.1", port)
    gone.request("POST", f"{API}/txt2img", many, {"Content-Type": "application/json"})
    wait_until(lambda: api.get_progress()["state"]["sampling_step"])
    gone.close()
    wait_until(lambda: api.get_progress()["state"]["job_count"] == 0)


# What clients send, word for word


def test_open_webui(client: TestClient, first: LatentDiffusionPipeline) -> None:
    """open-webui, backend/open_webui/routers/images.py at 02530d5, engine automatic1111."""
    login = {"authorization": "Basic " + base64.b64encode(b"user:word").decode()}
    assert client.get(f"{API}/options", headers={"authorization": ""}).status_code == 200
    models = client.get(f"{API}/sd-models", headers=login).json()
    assert [one["model_name"] for one in models] == ["first", "second"]
    body = {"prompt": "a cat", "batch_size": 1, "width": 32, "height": 32, "steps": 4}
    body |= {"negative_prompt": "a dog", "cfg_scale": 4.0, "sampler_name": "DDIM", "seed": 5}
    answer = client.post(f"{API}/txt2img", json=body, headers=login).json()
    call = {"num_inference_steps": 4, "negative_prompt": "a dog", "guidance_scale": 4.0}
    assert same(images_of(answer)[0], first(**CALL | call).images[0])
    assert isinstance(answer["info"], str) and answer["warnings"] == []


@pytest.mark.parametrize("hires", [False, True])
def test_sillytavern(hires: bool, client: TestClient, first: LatentDiffusionPipeline) -> None:
    """SillyTavern 1.12.6, src/endpoints/stable-diffusion.js and
    public/scripts/extensions/stable-diffusion/index.js, source "auto"."""
    for path in (
        "options",
        "sd-models",
        "samplers",
        "schedulers",
        "upscalers",
        "latent-upscale-modes",
        "sd-vae",
    ):
        assert client.get(f"{API}/{path}").status_code == 200
    title = client.get(f"{API}/options").json()["sd_model_checkpoint"]
    post(client, "options", sd_model_checkpoint=title)
    now = client.get(f"{API}/progress").json()
    assert (now["progress"], now["state"]["job_count"]) == (0, 0)
    body = {
        "url": "http://localhost:7860",
        "auth": "",
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "sampler_name": "DDIM",
        "scheduler": "automatic",
        "steps": 4,
        "cfg_scale": 7,
        "width": 32,
        "height": 32,
        "restore_faces": False,
        "enable_hr": hires,
        "hr_upscaler": "Latent",
        "hr_scale": 2.0,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "seed": 5,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    answer = post(client, "txt2img", **body)
    call = {"num_inference_steps": 4, "negative_prompt": "a dog"}
    call |= {"hires_scale": 2.0, "hires_strength": 0.7} if hires else {}
    assert same(images_of(answer)[0], first(**CALL | call).images[0])
    assert ("hr_upscaler" in str(answer["warnings"])) == hires
    assert client.post(f"{API}/interrupt").json() == {}


def test_an_answer_holds_the_settings_without_paths(
    client: TestClient, folder: Path, tmp_path: Path
) -> None:
    answer = client.post(f"{API}/txt2img", json=FAST | {"prompt": "<lora:fur:1>"})
    assert str(folder) not in answer.text
    file = tmp_path / "image.png"
    file.write_bytes(base64.b64decode(answer.json()["images"][0]))
    assert str(folder) not in str(read_texts(file))
