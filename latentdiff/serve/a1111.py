"""The protocol of AUTOMATIC1111's web UI: images, /progress and /interrupt.

`a1111_fields` is what requests say, `a1111_names` what they may choose from. Warnings are in the
answer and in its `info`; scripts are refused, as by that program without them.

Source: stable-diffusion-webui, modules/api/api.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import ImageOps
from PIL.Image import Resampling

from latentdiff import __version__
from latentdiff.data.images import to_srgb
from latentdiff.errors import choice_error
from latentdiff.images import encoded_image, read_texts
from latentdiff.pipelines.inputs import MAX_PIXELS
from latentdiff.pipelines.metadata import SAMPLERS as LABELS
from latentdiff.pipelines.metadata import parameters, read_parameters
from latentdiff.serve import a1111_names
from latentdiff.serve.a1111_fields import (
    Asked,
    EnlargeOne,
    EnlargeSeveral,
    Enlarging,
    ImageToImage,
    ReadSettings,
    TextToImage,
    resized,
    unused,
)
from latentdiff.serve.a1111_names import OURS, UPSCALERS, Options
from latentdiff.serve.engine import Job
from latentdiff.serve.requests import (
    Server,
    check_size,
    client_of,
    finished,
    given_file,
    given_image,
    orders,
    png,
    public,
    server_of,
)

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
router.include_router(a1111_names.router)


@router.post("/txt2img")
async def txt2img(asked: TextToImage, request: Request) -> JSONResponse:
    """Images of a prompt."""
    return await _answer(asked, request)


@router.post("/img2img")
async def img2img(asked: ImageToImage, request: Request) -> JSONResponse:
    """Images made anew from an image, or the masked part of it."""
    return await _answer(asked, request)


async def _answer(asked: Asked, request: Request) -> JSONResponse:
    server = server_of(request)
    job = await asyncio.to_thread(_submitted, asked, server, client_of(request))
    await _drop_files(asked, request)
    await finished(request, job)
    return JSONResponse(await asyncio.to_thread(_packed, asked, server, job))


async def _drop_files(asked: Asked, request: Request) -> None:
    """Let go of the files in base64, which the job has as images, while it waits."""
    if isinstance(asked, ImageToImage):
        for files in (asked.init_images, asked.mask):
            files[:] = [""] * len(files)
        (await request.json()).clear()  # the request keeps what it once read


def _submitted(asked: Asked, server: Server, client: str) -> Job:
    """The job of a request. Raises: UserError, HTTPException."""
    if asked.script_name:
        raise HTTPException(422, f"Script {asked.script_name!r:.60} not found")
    for name in asked.alwayson_scripts:
        raise HTTPException(422, f"always on script {name!r:.60} not found")
    model, vae, clip_skip = asked.override_settings.over(server).chosen(server.models)
    task, arguments = asked.task(server)
    wanted = orders(
        server,
        task,
        {**asked.shared(), "clip_skip": clip_skip, **arguments},
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        seed=None if asked.seed == -1 else asked.seed,
        count=asked.batch_size * asked.n_iter,
        guidance_scale=asked.cfg_scale,
        model=model,
        vae=vae,
    )
    return server.engine.submit(client, wanted)


def _packed(asked: Asked, server: Server, job: Job) -> dict[str, Any]:
    """The answer: all images of a job, or of one that was interrupted those that there are."""
    flagged = [k for k, one in enumerate(job.made) if one.flagged]
    notes = [*asked.notes(), *job.notes]
    if asked.save_images and server.settings.output is None:
        notes.append("save_images: without effect; the server was not started with --output")
    notes += [f"images[{k}]: flagged by the safety checker" for k in flagged]
    shown = {n: v for n, v in asked.known().items() if n not in ("init_images", "mask")}
    shown["override_settings"] = asked.override_settings.known(exclude_unset=True)
    return {
        "images": [_base64(png(one)) for one in job.made] if asked.send_images else [],
        "parameters": shown,
        "info": json.dumps({**_info(asked, job), "warnings": notes}),
        "warnings": notes,
    }


def _info(asked: Asked, job: Job) -> dict[str, Any]:
    """What A1111 says of images: lists have an entry for each that was made."""
    made = [(o, one) for o, one in zip(job.orders, job.images, strict=True) if one is not None]
    settings = [one.settings for _, one in made]
    first: dict[str, Any] = settings[0] if settings else {}
    model = public(first)["model"] if first else {}
    return {
        "prompt": asked.prompt,
        "all_prompts": [order.prompt for order, _ in made],
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [order.negative_prompt for order, _ in made],
        "seed": job.orders[0].seed,
        "all_seeds": [order.seed for order, _ in made],
        "subseed": -1,
        "all_subseeds": [-1 for _ in made],
        "subseed_strength": 0,
        "width": first.get("width"),
        "height": first.get("height"),
        "sampler_name": LABELS[asked.shared()["sampler"]],
        "cfg_scale": asked.cfg_scale,
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "sd_model_name": model.get("name"),
        "sd_model_hash": model.get("hash"),
        "sd_vae_name": model.get("vae"),
        "denoising_strength": asked.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters(public(one)) for one in settings],
        "styles": [],
        "clip_skip": (first.get("clip_skip") or 0) + 1,
        "version": f"latentdiff {__version__}",
    }


@router.post("/extra-single-image")
async def extra_single_image(asked: EnlargeOne, request: Request) -> dict[str, Any]:
    """An image enlarged."""
    image = await _enlarged(asked, asked.image, request)
    return {"html_info": "", "image": image, "warnings": unused(asked)}


@router.post("/extra-batch-images")
async def extra_batch_images(asked: EnlargeSeveral, request: Request) -> dict[str, Any]:
    """Images enlarged."""
    images = [await _enlarged(asked, one.data, request) for one in asked.images]
    return {"html_info": "", "images": images, "warnings": unused(asked)}


async def _enlarged(asked: Enlarging, data: str, request: Request) -> str:
    server, name = server_of(request), asked.upscaler_1
    if name not in (*UPSCALERS, OURS):
        raise choice_error("upscaler_1", name[:100], (*UPSCALERS, OURS))
    given = await asyncio.to_thread(given_image, data, "image", server.settings.max_pixels)
    image, scale, wanted = to_srgb(given), asked.upscaling_resize, None
    if asked.resize_mode == 1:
        wanted = asked.upscaling_resize_w, asked.upscaling_resize_h
        scale = max(wanted[0] / image.width, wanted[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    check_size(server.settings, *size)
    if name == OURS and scale > 1:
        model, vae, _ = Options().over(server).chosen(server.models)
        task = {"image": image, "scale": scale}
        job = server.engine.submit(
            client_of(request), orders(server, "upscale", task, model=model, vae=vae)
        )
        made = await finished(request, job)
        image = made[0].image if made else image

    def done() -> str:
        larger = resized(image, size, 0, UPSCALERS.get(name, Resampling.LANCZOS))
        if wanted and asked.upscaling_crop:
            larger = ImageOps.fit(larger, wanted, Resampling.LANCZOS)
        return _base64(encoded_image(larger, ".png", {}))

    return await asyncio.to_thread(done)


@router.post("/png-info")
def png_info(asked: ReadSettings) -> dict[str, Any]:
    """How the image was made, as far as its file says."""
    texts = read_texts(given_file(asked.image.strip(), "image", MAX_PIXELS))
    info = texts.pop("parameters", "")
    prompt, negative, fields = read_parameters(info)
    parsed = {"Prompt": prompt, "Negative prompt": negative, **fields} if info else {}
    return {"info": info, "items": texts, "parameters": parsed}


@router.get("/progress")
def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """How far this client's first job is; previews are made from when they are first asked for."""
    jobs = server_of(request).engine.jobs(client_of(request))
    state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": ""}
    state |= {"job_count": 0, "job_timestamp": "0", "job_no": 0}
    state |= {"sampling_step": 0, "sampling_steps": 0}
    idle = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None}
    if not jobs:
        return {**idle, "textinfo": None}
    job, at = jobs[0], jobs[0].progress
    job.wants_previews |= not skip_current_image
    shown = [] if skip_current_image else at.previews[:1]
    state |= {"interrupted": job.ended, "job": job.orders[0].task}
    state |= {"job_count": at.of, "job_no": at.made}
    state |= {"sampling_step": at.step, "sampling_steps": at.steps}
    return {
        "progress": at.share,
        "eta_relative": at.seconds_left or 0.0,
        "state": state,
        "current_image": next((_base64(encoded_image(one, ".png", {})) for one in shown), None),
        "textinfo": f"{at.ahead} images come before" if at.ahead else None,
    }


@router.post("/skip")
@router.post("/interrupt")
def interrupt(request: Request) -> dict[str, Any]:
    """End this client's requests, which answer with the images so far."""
    server_of(request).engine.interrupt(client_of(request))
    return {}


def ping() -> dict[str, Any]:
    """Whether it is there."""
    return {}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
