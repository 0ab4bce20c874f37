"""What is recorded of each image: all that making it again takes; `metadata` writes it to files.

Equal bits take the same arithmetic too: kernels add in an order that depends on the size of the
batch, the place in it, the number of threads and the processor.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import needs_unconditional
from latentdiff.errors import UserError
from latentdiff.pipelines.hashes import model_hash, weights_hash
from latentdiff.pipelines.metadata import pixels_hash
from latentdiff.pipelines.task import Events, PipelineOutput, run_to_the_end
from latentdiff.weights import raw_bytes

if TYPE_CHECKING:
    from latentdiff.pipelines.call import Wanted
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.task import Batch

P = ParamSpec("P")
#: Arguments of tasks that are images.
IMAGE_ARGUMENTS = ("image", "mask_image")


def image_settings(
    pipeline: LatentDiffusionPipeline,
    batches: Sequence[Batch],
    wanted: Sequence[Wanted],
    call: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The settings of each image of these passes.

    Args:    batches: the passes that were made.  wanted: one per image.
             call: what is the same for all of them.
    """
    shared = {**call, **surroundings(pipeline)}
    found = dict[int, dict[str, Any]]()
    for batch in batches:
        guided = needs_unconditional([wanted[k].scale for k in batch.indices])
        for place, (k, seed) in enumerate(zip(batch.indices, batch.seeds, strict=True)):
            found[k] = {
                "prompt": wanted[k].prompt,
                "negative_prompt": wanted[k].negative_prompt,
                "guidance_scale": wanted[k].scale,
                "seed": seed,
                "batch": {"size": len(batch.indices), "place": place, "guided": guided},
                "task": "text_to_image",  # unless `recorded` says otherwise
                "arguments": {},
                **shared,
            }
            if wanted[k].template != wanted[k].prompt:
                found[k]["template"] = wanted[k].template
    return [found[k] for k in sorted(found)]


def surroundings(pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """What is the same for all images of a pipeline: model, adapters, machine, versions."""
    from latentdiff import __version__

    source = pipeline.components.source
    if source is not None and "hash" not in pipeline.model:
        with suppress(OSError, UserError):  # it is there no more
            pipeline.model["hash"] = model_hash(source, pipeline.model.get("variant"))
    if pipeline.model.get("vae") and "vae_hash" not in pipeline.model:
        pipeline.model["vae_hash"] = weights_hash(pipeline.autoencoder.module)
    device = pipeline.device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "model": dict(pipeline.model),
        "loras": pipeline.loras.records(),
        "embeddings": list(pipeline.embeddings),
        "device": device.type,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": {"latentdiff": __version__, "torch": torch.__version__},
    }


def recorded(task: Callable[P, Events]) -> Callable[P, PipelineOutput]:
    """Decorate a task, see `run_to_the_end`, so that the settings of its images name it and what it
    was given besides `SamplingOptions`: of images the file, if there is one, and a hash."""
    signature = inspect.signature(task)

    def record(output: PipelineOutput, *args: P.args, **options: P.kwargs) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = {
            name: value
            for name, value in bound.arguments.items()
            if name not in ("pipeline", "prompt", "options")
        }
        inputs = {name: _described(given.pop(name, None)) for name in IMAGE_ARGUMENTS}
        asked = bound.arguments.get("options", {})
        for k, settings in enumerate(output.settings):
            own = {n: of[k * len(of) // len(output.settings)] for n, of in inputs.items() if of}
            settings |= {"task": task.__name__, "arguments": {**given, **own}}
            if "latents" not in asked:
                settings.pop("latents", None)
            if isinstance(output.images, list):
                settings["width"], settings["height"] = output.images[k].size

    @functools.wraps(task)
    def stream(*args: P.args, **options: P.kwargs) -> Events:
        for event in task(*args, **options):
            if isinstance(event, PipelineOutput):
                record(event, *args, **options)
            yield event

    return run_to_the_end(stream)


def _described(given: Any) -> list[dict[str, Any]]:
    """Where each of some images is, and the hash of its pixels; see `image_inputs.ImageInput`."""
    from PIL import Image

    if given is None:
        return []
    if isinstance(given, Tensor):
        batch = given[None] if given.ndim == 3 else given
        return [{"hash": hashlib.sha256(raw_bytes(one)).hexdigest()[:16]} for one in batch]
    several = [given] if isinstance(given, str | os.PathLike | bytes | Image.Image) else given
    found = []
    for one in several:
        if isinstance(one, Image.Image):
            found.append({"file": getattr(one, "filename", "") or None, "hash": pixels_hash(one)})
            continue
        with Image.open(io.BytesIO(one) if isinstance(one, bytes) else one) as image:
            file = None if isinstance(one, bytes) else os.fspath(one)
            found.append({"file": file, "hash": pixels_hash(image)})
    return found
