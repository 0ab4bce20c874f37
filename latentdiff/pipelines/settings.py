"""What is recorded of each image: all that making it again takes; `metadata` writes it to files.

Equal bits take the same arithmetic too: kernels add in an order that depends on the size of the
batch, the place in it, the number of threads and the processor.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
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
from latentdiff.pipelines.image_inputs import SOURCES, ImageInput, decoded_images
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

    def record(output: PipelineOutput, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        apart = ("pipeline", "prompt", "options", *IMAGE_ARGUMENTS)
        shared = {name: value for name, value in given.items() if name not in apart}
        for k, settings in enumerate(output.settings):
            own = {n: of[k * len(of) // len(output.settings)] for n, of in inputs.items() if of}
            settings |= {"task": task.__name__, "arguments": {**shared, **own}}
            if "latents" not in given.get("options", {}):
                settings.pop("latents", None)
            if isinstance(output.images, list):
                settings["width"], settings["height"] = output.images[k].size

    @functools.wraps(task)
    def stream(*args: P.args, **options: P.kwargs) -> Events:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        inputs = {}
        for name in IMAGE_ARGUMENTS:
            if name in bound.arguments:
                bound.arguments[name], inputs[name] = _opened(bound.arguments[name], name)
        for event in task(*bound.args, **bound.kwargs):
            if isinstance(event, PipelineOutput):
                record(event, bound.arguments, inputs)
            yield event

    return run_to_the_end(stream)


def _opened(given: ImageInput | None, name: str) -> tuple[Any, list[dict[str, Any]]]:
    """Images without their files, each read once; and where each was, and its pixels' hash.

    Raises: UserError: see `read_images`.
    """
    if given is None:
        return None, []
    if isinstance(given, Tensor):
        batch = given[None] if given.ndim == 3 else given
        return given, [{"hash": hashlib.sha256(raw_bytes(one)).hexdigest()[:16]} for one in batch]
    images = decoded_images(given, name, lambda one: one.copy())
    sources = [given] if isinstance(given, SOURCES) else given
    files = [
        os.fspath(one) if isinstance(one, str | os.PathLike) else getattr(one, "filename", None)
        for one in sources
    ]
    hashes = map(pixels_hash, images)
    return images, [{"file": f or None, "hash": h} for f, h in zip(files, hashes, strict=True)]
