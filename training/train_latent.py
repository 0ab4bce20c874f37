"""Train the U-Net of a latent diffusion model, from scratch or from a pretrained model.

    accelerate launch training/train_latent.py [--config FILE] [--resume] [section.key=value ...]
    python training/train_latent.py ...                          (the same on one process)

With no argument it trains on examples/twemoji with the embedded autoencoder and text encoder.
It ends with OUTPUT/model, a folder that this package's pipeline and diffusers both open; with
finetune.kind=lora or textual_inversion, with the small file that holds what was learned.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The thread that prepares batches shares a CPU's cores with the step: who waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from latentdiff.cli.arguments import add_resume, config_parser
from latentdiff.diffusion.objective import Model, per_sample_loss
from latentdiff.errors import UserError, command
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
    parser = config_parser(TrainConfig, __doc__)
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
