"""Train the U-Net of a latent diffusion model, from scratch or from a pretrained model.

    latentdiff train [--config FILE] [--resume] [section.key=value ...]
    accelerate launch -m latentdiff.train ...                (the same on any number of processes)

With no argument it trains on examples/twemoji with the embedded autoencoder and text encoder.
It ends with OUTPUT/model, a folder that this package's pipeline and diffusers both open; with
finetune.kind=lora or textual_inversion, with the small file that holds what was learned.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

# The thread that prepares batches shares a CPU's cores with the step: who waits must not spin.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import torch
from torch import Tensor

from latentdiff.diffusion.objective import Model, per_sample_loss
from latentdiff.errors import UserError, command
from latentdiff.train.arguments import add_resume, config_parser
from latentdiff.train.batches import LatentBatch
from latentdiff.train.config import Given, TrainConfig, read_config
from latentdiff.train.distributed import is_first_process
from latentdiff.train.latent_run import LatentRun
from latentdiff.train.memory import RAN_OUT


def train(given: Given, resume: bool) -> str:
    """Check everything, train, export. Returns: what was written, and how to use it."""
    run = LatentRun(given, resume)

    def denoising_loss(model: Model, batch: LatentBatch) -> Tensor:
        """Algorithm 1 (Ho et al. 2020): w_t · mean |y − model(α_t x_0 + σ_t ε, t, context)|²."""
        x_0 = run.autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        return per_sample_loss(
            model, x_0, batch.context, batch.draw, run.schedule, run.config.objective, batch.mask
        )

    loss = partial(run.method.loss, denoising_loss)
    run.begin(loss)
    for step, batch in run.steps():
        step.backward(loss(run.model, batch).mean())
        if step.update():
            run.update_averages(step.number)
    return run.finish()


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = config_parser(TrainConfig, __doc__, program="latentdiff train")
    add_resume(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        end = train(read_config(options.config, options.overrides), options.resume)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{RAN_OUT} ({str(error).splitlines()[0]})") from error
    if is_first_process():
        print(end)


if __name__ == "__main__":
    sys.exit(main())
