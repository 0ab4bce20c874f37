"""The page's own protocol: names and values are those of `LatentDiffusionPipeline`.

    POST /api/TASK      → lines of JSON: progress …, then the result or an error
    POST /api/settings  an image file → how it was made
    GET  /api/info      what may be asked for

A request is its job: it ends with its connection, and nothing is kept between two of them. What is
wrong with it is answered with 422 if that can be seen without the model; messages begin with the
name of the field. Whole numbers that a browser would round are texts.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from latentdiff import __version__
from latentdiff.diffusion.samplers import SAMPLERS, SPACINGS, get_spacing, split_name
from latentdiff.errors import UserError
from latentdiff.images import encoded_image
from latentdiff.models.prompts import PromptSyntax
from latentdiff.pipelines import task as pipelines
from latentdiff.pipelines.edit import MAX_BLUR
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.image_inputs import read_images
from latentdiff.pipelines.inputs import MAX_PIXELS
from latentdiff.pipelines.metadata import SAMPLERS as LABELS
from latentdiff.pipelines.metadata import SCHEDULES, parameters, read
from latentdiff.pipelines.restore import Kind
from latentdiff.pipelines.task import DEFAULT_STEPS
from latentdiff.serve.engine import TEXT_TO_IMAGE, Cancelled, Job, Progress
from latentdiff.serve.guard import failure
from latentdiff.serve.requests import (
    Server,
    client_of,
    given_file,
    given_image,
    given_mask,
    orders,
    png,
    public,
    server_of,
)

router = APIRouter(prefix="/api", tags=["latentdiff"])
#: What may be asked for.
TASKS = tuple(task for task in pipelines.TASKS if task != "interpolate")
SIDES = ("left", "right", "top", "bottom")
#: The longest side of a preview, in pixels.
PREVIEW = 256
#: Above it browsers round whole numbers.
_EXACT = 2**53
_Share = Annotated[float, Field(ge=0, le=1)]
_Pixels = Annotated[int, Field(ge=0, le=4096)]


class Asked(BaseModel):
    """A request; what is left out is the pipeline's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = ""
    negative_prompt: str = ""
    prompt_syntax: PromptSyntax = "a1111"
    model: str | None = None
    vae: str | None = None
    seed: int | str | None = None
    """A text keeps all its digits in browsers, whose numbers end at 2^53."""
    num_images: Annotated[int, Field(ge=1, le=64)] = 1
    guidance_scale: Annotated[float | None, Field(ge=0, le=100)] = None
    previews: bool = False

    height: Annotated[int | None, Field(ge=1, le=4096)] = None
    width: Annotated[int | None, Field(ge=1, le=4096)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_rescale: _Share | None = None
    sampler: str | None = None
    timestep_spacing: str | None = None
    clip_skip: Annotated[int | None, Field(ge=0)] = None
    hires_scale: Annotated[float | None, Field(gt=1, le=8)] = None
    hires_strength: _Share | None = None

    image: str | None = None
    mask_image: str | None = None
    strength: _Share | None = None
    mask_blur: Annotated[int | None, Field(ge=0, le=MAX_BLUR)] = None
    padding_mask_crop: _Pixels | None = None
    fill: bool | None = None
    left: _Pixels | None = None
    right: _Pixels | None = None
    top: _Pixels | None = None
    bottom: _Pixels | None = None
    scale: Annotated[float | None, Field(gt=1, le=8)] = None
    kind: Kind | None = None
    noise: Annotated[float | None, Field(ge=0.004, le=1)] = None
    blur: Annotated[float | None, Field(ge=0.1, le=20)] = None
    quality: Annotated[int | None, Field(ge=1, le=100)] = None


#: Fields that are not arguments of the pipeline, or not of all images of a batch.
_APART = ("prompt", "negative_prompt", "model", "vae", "seed", "num_images", "guidance_scale")


@router.get("/info")
def info(request: Request) -> dict[str, Any]:
    """What may be asked for, and what is meant by what is left out."""
    server = server_of(request)
    usual = {task: _usual(task) for task in TASKS}
    return {
        "version": __version__,
        "tasks": {task: {n: usual[task].get(n) for n in sorted(_taken(task))} for task in TASKS},
        "models": server.models.names,
        "defaults": server.models.defaults,
        "vaes": server.models.vaes,
        "loras": server.models.loras,
        "samplers": {name: LABELS[name] for name in SAMPLERS},
        "spacings": {name: SCHEDULES.get(name, name.upper()) for name in SPACINGS},
        "max_pixels": server.settings.max_pixels,
        "max_steps": server.settings.max_steps,
        "max_body": server.settings.max_body,
    }


@router.post("/settings")
async def settings(request: Request) -> dict[str, Any]:
    """How the image that is the body was made, as far as its file says."""
    body = given_file(await request.body(), "the file", MAX_PIXELS)
    record = await asyncio.to_thread(read, body)
    own = {name: value for name, value in record.settings.items() if name != "images"}
    return {"program": record.program, "settings": _exact(own), "why_not": record.why_not}


@router.post("/{task}")
async def make(task: str, asked: Asked, request: Request) -> StreamingResponse:
    """Make images: a line of JSON after each step, then one with all of them."""
    server = server_of(request)
    job = await asyncio.to_thread(_submitted, server, task, asked, client_of(request))
    # A proxy that gathers answers would hold progress back.
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    return StreamingResponse(_lines(job), headers=headers, media_type="application/x-ndjson")


def _own(task: str) -> dict[str, inspect.Parameter]:
    """The pipeline's arguments for a task."""
    return dict(inspect.signature(getattr(LatentDiffusionPipeline, task)).parameters)


def _taken(task: str) -> set[str]:
    """The fields that a task takes."""
    shared = {"num_inference_steps", "guidance_rescale", "sampler", "timestep_spacing"}
    shared |= {"clip_skip", "prompt_syntax", "previews", *_APART}
    return shared | (set(_own(task)) & set(Asked.model_fields))


def _usual(task: str) -> dict[str, Any]:
    """What a task takes for fields that are left out; those of the model are not among them."""
    own = {name: one.default for name, one in _own(task).items() if one.default is not one.empty}
    shared = {"num_images": 1, "num_inference_steps": DEFAULT_STEPS, "guidance_rescale": 0.0}
    return {**shared, **own}


def _submitted(server: Server, task: str, asked: Asked, client: str) -> Job:
    """The job of a request. Raises: UserError: naming the field."""
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}; got {task!r:.40}.")
    given = {name: value for name, value in asked if name in asked.model_fields_set}
    given = {name: value for name, value in given.items() if value is not None}
    if unused := sorted(set(given) - _taken(task)):
        raise UserError(f"{', '.join(unused)}: {task} does not take it.")
    most = server.settings.max_pixels
    if asked.sampler is not None:
        split_name(asked.sampler)
    if asked.timestep_spacing is not None:
        get_spacing(asked.timestep_spacing)
    if "image" in given:
        given["image"] = given_image(given["image"], "image", most)
    elif task != TEXT_TO_IMAGE:
        raise UserError(f"image is missing; {task} begins from one.")
    if "mask_image" in given:
        given["mask_image"] = given_mask(given["mask_image"], given["image"], most)
    elif task == "inpaint" and not read_images(given["image"]).clear.any():
        raise UserError("mask_image is missing, white where to paint; the image is opaque.")
    if task == "outpaint" and not any(given.get(side) for side in SIDES):
        raise UserError(f"left: one of {', '.join(SIDES)} must be above 0.")
    arguments = {"prompt_syntax": asked.prompt_syntax, **given}
    arguments = {n: v for n, v in arguments.items() if n not in (*_APART, "previews")}
    try:
        seed = None if asked.seed in (None, "") else int(asked.seed)
    except ValueError:
        raise UserError(f"seed must be a whole number; got {asked.seed!r:.40}.") from None
    wanted = orders(
        server,
        task,
        arguments,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        seed=seed,
        count=asked.num_images,
        guidance_scale=asked.guidance_scale,
        model=asked.model,
        vae=asked.vae,
    )
    return server.engine.submit(client, wanted, previews=asked.previews)


async def _lines(job: Job) -> AsyncIterator[bytes]:
    """What is sent of a job; it is dropped when the connection ends."""
    try:
        async with aclosing(job.events()) as events:
            async for progress in events:
                shown = await asyncio.to_thread(_shown, progress)
                yield _line({"event": "progress", **shown})
        yield _line({"event": "result", **await asyncio.to_thread(_result, job)})
    except Cancelled:
        return
    except Exception as error:
        yield _line({"event": "error", "message": failure(error)})
    finally:
        job.cancel()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _shown(progress: Progress) -> dict[str, Any]:
    shown = dict(vars(progress))
    shown["previews"] = []
    for one in progress.previews:
        small = one.copy()
        small.thumbnail((PREVIEW, PREVIEW))
        shown["previews"].append(_data_url(encoded_image(small, ".png", {})))
    return shown


def _result(job: Job) -> dict[str, Any]:
    made = [
        {
            "image": _data_url(png(one)),
            "seed": str(one.settings["seed"]),
            "settings": _exact(public(one.settings)),
            "parameters": parameters(one.settings),
            "flagged": one.flagged,
        }
        for one in job.made
    ]
    return {"images": made, "notes": job.notes}


def _exact(value: Any) -> Any:
    """The same with whole numbers as texts where browsers would round them."""
    if isinstance(value, dict):
        return {name: _exact(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(one) for one in value]
    large = isinstance(value, int) and abs(value) > _EXACT
    return str(value) if large else value


def _data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
