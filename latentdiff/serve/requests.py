"""What all protocols share: from what a request says to a job, and from images to bytes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
from fastapi import Request

from latentdiff.errors import UserError
from latentdiff.images import encoded_image
from latentdiff.models.prompts import NETWORK, parse
from latentdiff.pipelines.hashes import model_name
from latentdiff.pipelines.image_inputs import decoded_images, read_masks
from latentdiff.pipelines.inputs import check_seed, seeds_of
from latentdiff.pipelines.metadata import texts
from latentdiff.pipelines.task import DEFAULT_STEPS
from latentdiff.serve.engine import Cancelled, Engine, Job, Made, Order
from latentdiff.serve.files import Links
from latentdiff.serve.models import Models
from latentdiff.serve.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image


#: Characters of a prompt, far above what any text encoder reads.
MAX_PROMPT = 32_000
#: Tasks whose images the U-Net sees as a whole, so that attention grows with their pixels squared.
_AT_ONCE = ("text_to_image", "image_to_image", "outpaint", "variations")
#: Such images may have so many times the pixels of the model's training.
ENLARGED = 16
#: What images may be given in; Pillow hands some others to other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF")


@dataclass
class Server:
    """What the routes of an application work with; `request.app.state.server`."""

    settings: Settings
    models: Models
    engine: Engine
    links: Links
    options: dict[str, Any] = field(default_factory=dict)
    """What A1111's POST /options has set."""


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def client_of(request: Request) -> str:
    """Whose turn it is: the one with this address, and these credentials if there are any."""
    key = request.headers.get("authorization", "")
    host = request.client.host if request.client else ""
    return f"{host} {hashlib.sha256(key.encode()).hexdigest()[:8] if key else ''}"


def orders(
    server: Server,
    task: str,
    arguments: Mapping[str, Any],
    *,
    prompt: str = "",
    negative_prompt: str = "",
    seed: int | None = None,
    count: int = 1,
    guidance_scale: float | None = None,
    model: str | None = None,
    vae: str | None = None,
) -> list[Order]:
    """The images of a request: the k-th has seed + k.

    Args:    task: see `Order`.  arguments: the pipeline's others.  seed: None: drawn.
    Raises:  UserError: no such model, autoencoder or LoRA file, a prompt that is too long or
             cannot be read, a seed that there is not, or more steps or pixels than the server
             makes.
    """
    server.models.check(model, vae)
    syntax = arguments.get("prompt_syntax")
    _check_texts(server, syntax, prompt=prompt, negative_prompt=negative_prompt)
    _check_limits(server, task, arguments, model)
    if seed is not None:
        check_seed(seed, count)
    # Those of a request that says none are limited too.
    steps = min(DEFAULT_STEPS, server.settings.max_steps)
    arguments = {"num_inference_steps": steps, **arguments}
    return [
        Order(prompt, one, task, negative_prompt, guidance_scale, arguments, model, vae)
        for one in seeds_of(seed, count)
    ]


def _check_texts(server: Server, syntax: str | None, **texts: str) -> None:
    """Raises: UserError: prompts, by the names of their fields, that are too long or unreadable."""
    for name, text in texts.items():
        if len(text) > MAX_PROMPT:
            raise UserError(f"{name} may have {MAX_PROMPT:,} characters; it has {len(text):,}.")
        try:
            if name == "prompt" and server.models.lora_dir is not None:
                text, _ = server.models.lora_dir.split(text)
            tag = NETWORK.search(text)
            if tag and tag[1].lower() != "hypernet":
                why = "this server was started without --lora-dir"
                why = why if name == "prompt" else "only prompt may ask for LoRA files"
                raise UserError(f"{tag[0][:60]}: {why}. Take it out.")
            if syntax == "a1111":
                parse(text)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def _check_limits(
    server: Server, task: str, arguments: Mapping[str, Any], model: str | None
) -> None:
    """Raises: UserError: more steps or pixels than a request may ask for, or a side that the model
    does not draw, as far as its size is known; naming the field that asks for the most."""
    given = {name: value for name, value in arguments.items() if value is not None}
    steps, most = given.get("num_inference_steps", 0), server.settings.max_pixels
    if steps > server.settings.max_steps:
        raise UserError(f"num_inference_steps may be {server.settings.max_steps}; got {steps}.")
    trained = server.models.size(model)
    multiple = trained["multiple"]
    for name in ("width", "height"):
        if given.get(name, 0) % multiple:
            nearest = max(1, round(given[name] / multiple)) * multiple
            raise UserError(
                f"{name} must be a multiple of {multiple}; got {given[name]}. The nearest is "
                f"{nearest}."
            )
    if task in _AT_ONCE or (task == "inpaint" and "padding_mask_crop" not in given):
        most = min(most, ENLARGED * trained["width"] * trained["height"])
    width, height = (given.get(name, trained[name]) for name in ("width", "height"))
    if "image" in given:
        width, height = given["image"].size
    whole = {"image": width * height / most} if "image" in given else {}
    of = {"width": trained["width"], "height": trained["height"], "hires_scale": 1, "scale": 1}
    of |= {"left": width, "right": width, "top": height, "bottom": height}
    shares = whole | {name: given[name] / by for name, by in of.items() if name in given}
    blamed = max(shares, key=shares.__getitem__, default="width")
    scale = given.get("scale", 2 if task == "upscale" else given.get("hires_scale", 1))
    width = (width + given.get("left", 0) + given.get("right", 0)) * scale
    height = (height + given.get("top", 0) + given.get("bottom", 0)) * scale
    _check_pixels(most, width, height, blamed)


def check_size(settings: Settings, width: float, height: float) -> None:
    """Raises: UserError: an image of more pixels than any request may ask for."""
    _check_pixels(settings.max_pixels, width, height, "width")


def _check_pixels(most: int, width: float, height: float, name: str) -> None:
    if width * height > most:
        raise UserError(
            f"{name}: an image may have {most:,} pixels here; this would be {width:.0f} x "
            f"{height:.0f}."
        )


async def finished(request: Request, job: Job) -> list[Made]:
    """The images of a job, which is dropped if the client goes away.

    Raises: what it failed of; Cancelled.
    """
    waiting = asyncio.ensure_future(job.result())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Cancelled
        return waiting.result()
    finally:
        gone.cancel()
        if not waiting.done():
            job.cancel()
            waiting.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def given_image(data: bytes | str, name: str, most: int) -> Image:
    """An image out of a request.

    Args:    data: a file's bytes, or these in base64, as a data URL or plain.
             name: how messages call it.  most: pixels.
    Raises:  UserError: none of these, unreadable, animated, or too large.
    """
    content = given_file(data, name, most)
    return decoded_images(content, name, lambda one: one.copy())[0]


def given_file(data: bytes | str, name: str, most: int) -> bytes:
    """The bytes of an image, of which no more than the size was read; as `given_image`."""
    content = from_base64(data, name) if isinstance(data, str) else data
    try:
        with PIL.Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # decoders fed with broken data raise nearly anything
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"{name} cannot be read as an image in {kinds}.") from error
    if width * height > most:
        raise UserError(f"{name} may have {most:,} pixels; it has {width} x {height}.")
    return content


def given_mask(data: bytes | str, image: Image, most: int) -> Image:
    """A mask for that image, as `given_image`. Raises: UserError: see `read_masks`."""
    mask = given_image(data, "mask_image", most)
    read_masks(mask, (image.height, image.width), 1)
    return mask


def from_base64(text: str, name: str) -> bytes:
    head, sign, body = text.partition(",")
    digits = body if sign and head.startswith("data:") else text
    try:
        # MIME's base64 has line breaks, RFC 2045, section 6.8.
        return base64.b64decode("".join(digits.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} must be an image file in base64, or a data URL of it.") from error


def png(one: Made) -> bytes:
    """The file of an image, with how it was made."""
    return encoded_image(one.image, ".png", texts(public(one.settings)))


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an image without where the server has its files."""
    model = {**settings["model"]}
    model["source"] = model.get("name")
    if vae := model.get("vae"):
        model["vae"] = Path(vae).name if Path(vae).is_absolute() else model_name(vae)
    files = {
        name: [{key: v for key, v in one.items() if key != "file"} for one in settings[name]]
        for name in ("loras", "embeddings")
    }
    return {**settings, "model": model, **files}
