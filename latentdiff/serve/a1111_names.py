"""What clients of AUTOMATIC1111's web UI may choose from, and what is chosen: names and lists.

A model is called by its title, `name [hash]`, its name or its hash. POST /options sets what later
requests begin from; override_settings hold for one request.

Source: stable-diffusion-webui, modules/api/api.py, modules/api/models.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import PIL.Image
import psutil
from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentdiff.diffusion.samplers import SAMPLERS, split_name
from latentdiff.errors import some, whole_text
from latentdiff.pipelines.metadata import SAMPLERS as LABELS
from latentdiff.pipelines.metadata import SCHEDULES, spacing_of
from latentdiff.serve.models import OWN_VAE, Models
from latentdiff.serve.requests import Server, server_of

router = APIRouter()
#: What enlarges images; clients that leave it open say None.
UPSCALERS = {
    "None": PIL.Image.Resampling.LANCZOS,
    "Lanczos": PIL.Image.Resampling.LANCZOS,
    "Bicubic": PIL.Image.Resampling.BICUBIC,
    "Nearest": PIL.Image.Resampling.NEAREST,
}
#: The upscaler that is a task of the model.
OURS = "latentdiff"
#: Lists of things that there are not here.
_EMPTY = (
    *("hypernetworks", "face-restorers", "realesrgan-models", "latent-upscale-modes"),
    *("prompt-styles", "script-info", "extensions"),
)


class Given(BaseModel):
    """What a client sends. What is null is as if it were left out; unknown names are kept; halves
    of surrogate pairs, which no answer could hold, are replaced."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _cleaned(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {name: value for name, value in given.items() if value is not None}
        return {n: whole_text(v) if isinstance(v, str) else v for n, v in said.items()}

    @property
    def others(self) -> dict[str, Any]:
        """What has no field here."""
        return self.model_extra or {}

    def known(self, **options: Any) -> dict[str, Any]:
        """The values of fields; options of pydantic's `model_dump`."""
        return self.model_dump(by_alias=True, exclude=set(self.others), **options)


def unknown(names: Iterable[str]) -> list[str]:
    """A warning of fields that nobody knows, if there are any."""
    short = [name[:60] for name in names]
    return [f"unknown, without effect: {some(short, 50)}"] if short else []


class Options(Given):
    """What is asked of A1111's options; the defaults are its own."""

    sd_model_checkpoint: str = ""
    """The default model if empty."""
    sd_vae: str = OWN_VAE
    clip_stop: Annotated[int, Field(ge=1, le=12, alias="CLIP_stop_at_last_layers")] = 1
    """1: as the model's text encoder does; 2: without its last layer …"""

    def over(self, server: Server) -> Options:
        """These, and those that POST /options has set where nothing is said here."""
        return Options.model_validate({**server.options, **self.known(exclude_unset=True)})

    def chosen(self, models: Models) -> tuple[str | None, str | None, int | None]:
        """Model, autoencoder and clip_skip. Raises: UserError: a name that there is not."""
        model, vae = model_named(models, self.sd_model_checkpoint), self.sd_vae
        vae = OWN_VAE if vae in ("", "None") else vae
        models.check(model, vae)
        return model, vae, self.clip_stop - 1 if self.clip_stop > 1 else None


def title(models: Models, name: str) -> str:
    """A model's name with its hash."""
    hashed = models.hash(name)
    return name if hashed is None else f"{name} [{hashed}]"


def model_named(models: Models, text: str) -> str | None:
    """The model of a title, a name or a hash; None: the default."""
    if not text or text in models.names:
        return text or None
    known = {spelled: name for name in models.names for spelled in (title(models, name), name)}
    known |= {models.hash(name) or name: name for name in models.names}
    return known.get(text, text[:100])


def sampler_and_spacing(sampler: str, schedule: str) -> tuple[str, str]:
    """Our names of A1111's. A schedule at the end of the sampler's name counts more.

    Raises:  UserError: one that there is not.
    """
    name, spacing = split_name(sampler[:100])
    return name, spacing_of(name, spacing or schedule or "automatic")


def may_set(request: Request) -> None:
    """Let who has a key, or sits at this machine. Raises: HTTPException."""
    local = request.client is not None and request.client.host in ("127.0.0.1", "::1")
    if server_of(request).settings.api_key is None and not local:
        raise HTTPException(403, "only from the server's own machine, or with an API key.")


@router.get("/options")
def options(request: Request) -> dict[str, Any]:
    """What requests begin from."""
    server = server_of(request)
    now, models = Options().over(server), server.models
    model = model_named(models, now.sd_model_checkpoint) or models.names[0]
    return {
        **now.known(),
        "sd_model_checkpoint": title(models, model),
        "sd_checkpoint_hash": models.hash(model),
        "samples_format": "png",
    }


@router.post("/options", dependencies=[Depends(may_set)])
def set_options(given: Options, request: Request) -> dict[str, Any]:
    """Set what later requests begin from, of every client; those that run or wait do not change."""
    server = server_of(request)
    if server.settings.links is not None:
        raise HTTPException(
            409, "replicas share no options; use override_settings in each request."
        )
    given.chosen(server.models)
    server.options.update(given.known(exclude_unset=True))
    said = options(request)
    return {"warnings": unknown(name for name in given.others if name not in said)}


@router.post("/unload-checkpoint", dependencies=[Depends(may_set)])
def unload(request: Request) -> dict[str, Any]:
    """Free the memory of models; the next request loads its own again."""
    server_of(request).models.unload()
    return {}


@router.post("/reload-checkpoint")
@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
def refresh() -> dict[str, Any]:
    """Nothing: what may be named was fixed at the start, and is loaded when it is asked for."""
    return {}


@router.get("/sd-models")
def sd_models(request: Request) -> list[dict[str, Any]]:
    """The models, the default first."""
    models = server_of(request).models
    return [
        {
            "title": title(models, name),
            "model_name": name,
            "hash": models.hash(name),
            "sha256": None,
            "filename": name,
            "config": None,
        }
        for name in models.names
    ]


@router.get("/sd-vae")
def sd_vae(request: Request) -> list[dict[str, str]]:
    """The autoencoders besides the models' own."""
    return [{"model_name": name, "filename": name} for name in server_of(request).models.vaes]


@router.get("/loras")
def loras(request: Request) -> list[dict[str, Any]]:
    """LoRA files as prompts name them: <lora:name:0.7>."""
    names = server_of(request).models.loras
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/embeddings")
def embeddings(request: Request) -> dict[str, Any]:
    """The learned words of the default model; none as long as it is not in memory."""
    models, words = server_of(request).models, dict[str, Any]()
    if models.names[0] in models.loaded:
        unsaid = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
        with models.use(None, None) as pipeline:
            words = {word["token"]: unsaid for word in pipeline.embeddings}
    return {"loaded": words, "skipped": {}}


@router.get("/memory")
def memory() -> dict[str, Any]:
    """Bytes of this process, and of its GPU."""
    import torch

    used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    cuda: dict[str, Any] = {"error": "unavailable"}
    if torch.cuda.is_available():
        free, most = torch.cuda.mem_get_info()
        cuda = {"system": {"free": free, "used": most - free, "total": most}}
    return {"ram": {"free": total - used, "used": used, "total": total}, "cuda": cuda}


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    """The samplers under A1111's names, and what else they are called."""
    return [
        {"name": LABELS[key], "aliases": [key, *row.aliases], "options": {}}
        for key, row in SAMPLERS.items()
    ]


@router.get("/schedulers")
def schedulers() -> list[dict[str, Any]]:
    """The schedules of noise levels."""
    labels = ["Automatic", *SCHEDULES.values()]
    return [
        {
            "name": label.lower().replace(" ", "_"),
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if label == "Karras" else -1.0,
            "need_inner_model": False,
        }
        for label in labels
    ]


@router.get("/upscalers")
def upscalers() -> list[dict[str, Any]]:
    """What /extra-single-image may enlarge with."""
    none = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    return [{"name": name, **none} for name in (*UPSCALERS, OURS)]


@router.get("/cmd-flags")
def cmd_flags(request: Request) -> dict[str, Any]:
    """How it was started, as far as clients need it."""
    settings = server_of(request).settings
    return {"api": True, "port": settings.port, "subpath": settings.root_path or None}


@router.get("/scripts")
def scripts() -> dict[str, list[str]]:
    """There are none."""
    return {"txt2img": [], "img2img": []}


def nothing() -> list[Any]:
    """There is none of it."""
    return []


for _name in _EMPTY:
    router.add_api_route(f"/{_name}", nothing)
