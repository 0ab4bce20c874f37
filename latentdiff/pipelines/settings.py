"""What is recorded of each image: all that making it again takes; `metadata` writes it to files.

Equal bits take the same arithmetic too: kernels add in an order that depends on the size of the
batch, the place in it, the number of threads and the processor.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.diffusion.guidance import needs_unconditional
from latentdiff.errors import UserError
from latentdiff.pipelines.hashes import model_hash

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.task import Batch, Condition


def image_settings(
    pipeline: LatentDiffusionPipeline,
    batches: Sequence[Batch],
    conditions: Sequence[Condition],
    call: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The settings of each image of a call.

    Args:    conditions: one per image.  call: what is the same for all of them.
    """
    shared = {**call, **_surroundings(pipeline)}
    found = dict[int, dict[str, Any]]()
    for batch in batches:
        guided = needs_unconditional([conditions[k].scale for k in batch.indices])
        for place, (k, seed) in enumerate(zip(batch.indices, batch.seeds, strict=True)):
            found[k] = {
                "prompt": conditions[k].prompt,
                "negative_prompt": conditions[k].negative_prompt,
                "guidance_scale": conditions[k].scale,
                "seed": seed,
                "batch": {"size": len(batch.indices), "place": place, "guided": guided},
                **shared,
            }
    return [found[k] for k in range(len(conditions))]


def _surroundings(pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    from latentdiff import __version__

    source = pipeline.components.source
    if source is not None and "hash" not in pipeline.model:
        with suppress(OSError, UserError):  # it is there no more
            pipeline.model["hash"] = model_hash(source, pipeline.model.get("variant"))
    device = pipeline.device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "model": dict(pipeline.model),
        "loras": pipeline.loras.records(),
        "embeddings": list(pipeline.embeddings),
        "device": str(device),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": {"latentdiff": __version__, "torch": torch.__version__},
    }
