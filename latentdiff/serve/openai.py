"""OpenAI's image protocol.

    POST /v1/images/generations   JSON
    POST /v1/images/edits         multipart: image or image[], mask
    GET  /v1/images/files/NAME    what `url` leads to, for an hour; its name stands for the key
    GET  /v1/models

Fields are OpenAI's, and of its other servers: `seed`, `steps` (`num_inference_steps`), `guidance`
(`guidance_scale`, `cfg_scale`), `negative_prompt`, `sampler`; and `strength` for edits. What has no
effect here (`quality`, `style`, `user` …) or is unknown is named in the answer's `warnings`.

- Prompts of any length are read, without weights or tags.
- `size` is WIDTHxHEIGHT; "auto" is the size of the model's training. An edited image keeps its own.
- `response_format` is b64_json unless asked for as url.
- `model` is one of /v1/models. OpenAI's own names, which many clients always send, stand for the
  default model, with a warning.
- `mask` says by transparency what is painted anew, as OpenAI's does; without one the transparent
  parts of the image are; an opaque image is painted anew as a whole, as far as `strength` goes.
- `stream` sends events, with previews if `partial_images` asks for them.

Source: openai-python, src/openai/types/image_generate_params.py, image_edit_params.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from latentdiff.data.images import to_rgb
from latentdiff.diffusion.samplers import split_name
from latentdiff.errors import UserError, choice_error
from latentdiff.images import encoded_image
from latentdiff.pipelines.metadata import texts
from latentdiff.serve.engine import TEXT_TO_IMAGE, Cancelled, Job, Made
from latentdiff.serve.guard import failure
from latentdiff.serve.requests import (
    Server,
    client_of,
    finished,
    given_image,
    orders,
    public,
    server_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

router = APIRouter(prefix="/v1", tags=["OpenAI"])
#: OpenAI's own models.
_THEIRS = re.compile(r"(dall-e|gpt-image|chatgpt-image)\b")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_IMAGE = re.compile(r"image(\[\d*\])?")
#: Fields by the names that the pipeline has for them, with which its messages begin.
_FIELDS = {
    "num_inference_steps": ("steps", "num_inference_steps"),
    "guidance_scale": ("guidance", "guidance_scale", "cfg_scale"),
    "mask_image": ("mask",),
    "image height and width": ("size",),
    "width": ("size",),
    "height": ("size",),
    **{name: (name,) for name in ("prompt", "negative_prompt", "seed", "strength", "image")},
}
_NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


class FieldError(UserError):
    """An error about one field."""

    def __init__(self, text: str, param: str, code: str | None = None) -> None:
        super().__init__(text)
        self.param, self.code = param, code


class Asked(BaseModel):
    """The fields of a request that have an effect; others are named in a warning."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=32_000)]
    model: str | None = None
    n: Annotated[int | None, Field(ge=1)] = 1
    size: str | None = "auto"
    response_format: Literal["url", "b64_json"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    stream: bool | None = False
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = 0
    negative_prompt: str | None = ""
    seed: Annotated[int | None, Field(ge=-1, lt=2**64)] = None
    """Of the first image, image k has seed + k; none, or -1: drawn."""
    steps: Annotated[
        int | None, Field(ge=1, validation_alias=AliasChoices(*_FIELDS["num_inference_steps"]))
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            validation_alias=AliasChoices(*_FIELDS["guidance_scale"]),
        ),
    ] = None
    sampler: str | None = None
    strength: Annotated[float | None, Field(ge=0, le=1)] = None
    """Of edits: 0 keeps the image, 1 keeps nothing of what is painted."""
    _said: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="wrap")
    @classmethod
    def _remembers(cls, given: Any, validated: ModelWrapValidatorHandler[Asked]) -> Asked:
        asked = validated(given)
        asked._said = set(given)
        return asked

    def error(self, error: UserError) -> UserError:
        """The same, about the field as the client calls it."""
        text = str(error)
        name = next((one for one in _FIELDS if re.match(rf"{one}\b", text)), None)
        if isinstance(error, FieldError) or name is None:
            return error
        field = next((one for one in _FIELDS[name] if one in self._said), _FIELDS[name][0])
        side = field == "size" and not text.startswith(f"{name}:")
        return FieldError(f"{field}: {text}" if side else field + text[len(name) :], field)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that requests may name; the first is the default."""
    names = server_of(request).models.names
    return {"object": "list", "data": [_model(name) for name in names]}


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    if name not in server_of(request).models.names:
        raise HTTPException(404, f"there is no model {name!r:.100}.")
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "latentdiff"}


@router.get("/images/files/{name}")
async def image_file(name: str, request: Request) -> FileResponse:
    """An image that was asked for as `url`."""
    file = server_of(request).links.find(name)
    if file is None:
        raise HTTPException(404, "there is no such image, or no longer.")
    return FileResponse(file)


@router.post("/images/generations")
async def generations(asked: Asked, request: Request) -> Response:
    """Draw images of a prompt."""
    size = _size(asked)
    sides = {} if size is None else {"width": size[0], "height": size[1]}
    return await _answer(request, asked, "image_generation", TEXT_TO_IMAGE, sides)


@router.post("/images/edits")
async def edits(request: Request) -> Response:
    """Paint an image anew, in part or as a whole."""
    async with request.form(max_files=20, max_fields=100) as form:
        given = [(name, await _content(value)) for name, value in form.multi_items()]
    masks = [value for name, value in given if name == "mask"]
    images = [value for name, value in given if _IMAGE.fullmatch(name)]
    try:
        asked = Asked.model_validate(
            {n: v for n, v in given if v != "" and n != "mask" and not _IMAGE.fullmatch(n)}
        )
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    if len(images) != 1:
        raise FieldError(f"image must be one file; got {len(images)}.", "image")
    if len(masks) > 1:
        raise FieldError(f"mask may be one file; got {len(masks)}.", "mask")
    most = server_of(request).settings.max_pixels
    mask = masks[0] if masks else None
    task, arguments = await asyncio.to_thread(_edit, images[0], mask, most)
    own = arguments["image"].size
    if _size(asked) not in (None, own):
        text = f"an edited image keeps its size: size must be auto or {own[0]}x{own[1]}"
        raise FieldError(f"{text}; got {asked.size!r:.40}.", "size")
    if asked.strength is not None:
        arguments["strength"] = asked.strength
    return await _answer(request, asked, "image_edit", task, arguments)


async def _content(value: UploadFile | str) -> bytes | str:
    return value if isinstance(value, str) else await value.read()


def _edit(image: bytes | str, mask: bytes | str | None, most: int) -> tuple[str, dict[str, Any]]:
    """Task and arguments of an edit. Raises: UserError: what is no image, or does not fit."""
    from PIL import ImageChops

    with _about("image"):
        base = given_image(image, "image", most)
    if mask is None:
        clear = base.has_transparency_data and _alpha(base).getextrema()[0] < 255  # type: ignore[operator]
        return "inpaint" if clear else "image_to_image", {"image": base}
    with _about("mask"):
        given = given_image(mask, "mask", most)
        if given.size != base.size:
            sizes = ["{}x{}".format(*one.size) for one in (base, given)]
            raise UserError(f"mask must be of the image's size, {sizes[0]}; got {sizes[1]}.")
        painted = ImageChops.invert(_alpha(given)) if given.has_transparency_data else None
        if painted is None or not painted.getextrema()[1]:
            raise UserError("mask must be transparent where the image is to be painted anew.")
    return "inpaint", {"image": base, "mask_image": painted}


def _alpha(image: Image) -> Image:
    return image.convert("RGBA").getchannel("A")


@contextmanager
def _about(param: str, code: str | None = None) -> Iterator[None]:
    """Have errors name the field."""
    try:
        yield
    except UserError as error:
        raise FieldError(str(error), param, code) from error


def _size(asked: Asked) -> tuple[int, int] | None:
    """(width, height), or None. Raises: UserError."""
    if asked.size in (None, "auto"):
        return None
    found = _SIZE.fullmatch(asked.size)
    if found is None:
        text = f"size must be auto, or width and height such as 512x512; got {asked.size!r:.40}."
        raise FieldError(text, "size")
    return int(found[1]), int(found[2])


async def _answer(
    request: Request, asked: Asked, kind: str, task: str, own: Mapping[str, Any]
) -> Response:
    """What a request is answered. Args: kind: of the events.  own: arguments of the task."""
    server = server_of(request)
    try:
        job, warnings = await asyncio.to_thread(
            _submitted, server, client_of(request), asked, task, own
        )
        if asked.stream:
            events = _events(job, asked, kind)
            return StreamingResponse(events, media_type="text/event-stream")
        made = await finished(request, job)
    except UserError as error:
        raise asked.error(error) from error
    if not made:
        raise HTTPException(503, "the request was interrupted.")
    contents = await asyncio.to_thread(lambda: [_encoded(one, asked) for one in made])
    if asked.response_format == "url":
        data = [{"url": await _link(request, one, asked)} for one in contents]
    else:
        data = [{"b64_json": base64.b64encode(one).decode()} for one in contents]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "output_format": asked.output_format or "png",
            "size": _sides(made[0]),
            "seeds": [one.settings["seed"] for one in made],
            "warnings": warnings + job.notes,
        }
    )


async def _link(request: Request, content: bytes, asked: Asked) -> str:
    keep = server_of(request).links.keep
    name = await asyncio.to_thread(keep, content, f".{asked.output_format or 'png'}")
    return str(request.url_for("image_file", name=name))


def _submitted(
    server: Server, client: str, asked: Asked, task: str, own: Mapping[str, Any]
) -> tuple[Job, list[str]]:
    """The job, and what was asked for without effect. Raises: UserError."""
    usual = (None, "auto")
    unused = [name for name, value in (asked.model_extra or {}).items() if value not in usual]
    warnings = [f"{name!r:.60} has no effect here." for name in unused]
    names, name = server.models.names, asked.model or None
    if name is not None and name not in names:
        if not _THEIRS.match(name):
            raise FieldError(str(choice_error("model", name, names)), "model", "model_not_found")
        warnings.append(f"there is no model {name!r:.60} here; {names[0]} is taken.")
        name = None
    arguments: dict[str, Any] = {"prompt_syntax": "long", **own}
    if asked.steps is not None:
        arguments["num_inference_steps"] = asked.steps
    if asked.sampler:
        with _about("sampler"):
            split_name(asked.sampler)
        arguments["sampler"] = asked.sampler
    wanted = orders(
        server,
        task,
        arguments,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        seed=None if asked.seed == -1 else asked.seed,
        count=asked.n or 1,
        guidance_scale=asked.guidance,
        model=name,
    )
    with _about("n"):
        job = server.engine.submit(client, wanted, previews=bool(asked.partial_images))
    return job, warnings


def _encoded(one: Made, asked: Asked) -> bytes:
    ending = asked.output_format or "png"
    image = to_rgb(one.image) if ending == "jpeg" else one.image
    return encoded_image(image, f".{ending}", texts(public(one.settings)))


def _sides(one: Made) -> str:
    return f"{one.image.width}x{one.image.height}"


async def _events(job: Job, asked: Asked, kind: str) -> AsyncIterator[bytes]:
    """What is sent of a job step by step; it is dropped when the connection ends."""
    shown, wanted = 0, asked.partial_images or 0
    try:
        async with aclosing(job.events()) as events:
            async for progress in events:
                due = progress.share * (wanted + 1) >= shown + 1
                if shown < wanted and due and progress.previews:
                    content = encoded_image(progress.previews[0], ".png", {})
                    yield _event(f"{kind}.partial_image", content, "png", partial_image_index=shown)
                    shown += 1
        for one in job.made:
            content = await asyncio.to_thread(_encoded, one, asked)
            ending = asked.output_format or "png"
            more = {"size": _sides(one), "usage": _NO_USAGE, "seed": one.settings["seed"]}
            yield _event(f"{kind}.completed", content, ending, **more)
    except Cancelled:
        return
    except Exception as error:
        known = asked.error(error) if isinstance(error, UserError) else error
        kinds = {"type": "server_error", "param": getattr(known, "param", None), "code": None}
        if isinstance(error, UserError):
            kinds["type"] = "invalid_request_error"
        yield _line("error", {"error": {"message": failure(known), **kinds}})
    finally:
        job.cancel()


def _event(name: str, content: bytes, ending: str, **more: Any) -> bytes:
    about = {"created_at": int(time.time()), "output_format": ending, "size": "auto"}
    about |= {"quality": "auto", "background": "auto"}
    return _line(name, {**about, **more, "b64_json": base64.b64encode(content).decode()})


def _line(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
