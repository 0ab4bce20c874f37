"""Train the U-Net of a latent diffusion model, from scratch or from a pretrained model.

    accelerate launch training/train_latent.py [--config FILE] [--resume] [section.key=value ...]
    python training/train_latent.py ...                          (the same on one process)

With no argument it trains on examples/twemoji with the embedded autoencoder and text encoder.
It ends with OUTPUT/model, a folder that this package's pipeline and diffusers both open; with
finetune.kind=lora or textual_inversion, with the small file that holds what was learned.
"""

from __future__ import annotations

import argparse
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

from latentdiff.config import describe
from latentdiff.diffusion.objective import per_sample_loss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, command
from latentdiff.finetune.registry import apply_method
from latentdiff.train.batches import BatchMaker, ContextCache, make_order
from latentdiff.train.checkpoint import (
    CHECKPOINTS,
    TrainingState,
    check_output,
    is_started,
    open_output,
    stored_facts,
)
from latentdiff.train.config import (
    Given,
    TrainConfig,
    deciding_facts,
    default_facts,
    read_config,
)
from latentdiff.train.distributed import is_first_process, prepare, start_processes, was_restarted
from latentdiff.train.ema import AllAverages, Ema, PowerEmas
from latentdiff.train.log import MEBI, Tracker, peak_memory
from latentdiff.train.loop import OptimizerStep, training_loop
from latentdiff.train.memory import RAN_OUT, halved_note, probe, trial_loss
from latentdiff.train.optimizer import learning_rate, make_optimizer, never_at_peak
from latentdiff.train.run import (
    batch_shape,
    check_extras,
    check_steps_left,
    ending,
    environment,
    export_trained,
    load_parts,
    long_captions,
    make_gauges,
    more_writers,
    none_held_out,
    on_the_example,
    open_latents,
    prepare_unet,
    save_config,
    write_environment,
)
from latentdiff.train.validation import Validator


def train(given: Given, resume: bool) -> str:
    """Check everything, train, export. Returns: what was written, and how to use it."""
    config, output = given.config, Path(given.config.output)
    check_extras(config.optimizer.kind, config.loop.wandb, config.finetune.kind)
    accelerator = start_processes(config.loop.mixed_precision, shards=True)
    resume = resume or (was_restarted() and is_started(output))
    check_output(output, resume)
    before = stored_facts(output / CHECKPOINTS) if resume else None
    nothing_left = check_steps_left(before, config.loop.max_steps)
    components, config, notes = load_parts(given)
    autoencoder, schedule = (
        components.autoencoder.to(accelerator.device),
        NoiseSchedule(config.schedule),
    )
    latents = open_latents(config, autoencoder, accelerator)
    accelerator.wait_for_everyone()  # all have looked at the output folder before one writes there
    lock = open_output(output) if accelerator.is_main_process else None

    prepare_unet(components, config, accelerator)
    components.text_encoder.to(accelerator.device)
    torch.manual_seed(config.loop.seed)
    trainee = apply_method(components, config.finetune)
    unet = trainee.module
    gauges = make_gauges(components, latents, accelerator, frozen=trainee.adds)
    optimizer = make_optimizer(unet, config.optimizer)
    model, prepared_optimizer = prepare(accelerator, unet, optimizer)
    ema = Ema(unet, config.loop.ema_decay)
    powers = PowerEmas(unet, config.power_ema, output, accelerator.is_main_process)
    shape, recut = batch_shape(config, accelerator, before)
    context = ContextCache(trainee.encoder, config.latents.context_megabytes * 2**20)
    facts = {**deciding_facts(config), **latents.facts(), "pictures per step": shape.total}
    facts |= trainee.facts()
    keep = (config.loop.keep_last, config.loop.keep_every)
    averages = AllAverages(ema, powers)
    state = TrainingState(
        {"unet": unet},
        {"unet": optimizer},
        accelerator,
        output / CHECKPOINTS,
        *keep,
        facts,
        averages,
        whole=not trainee.adds,
        defaults=default_facts(config),
    )
    first_step, seconds = state.resume() if resume else (0, 0.0)
    if config.loop.probe_memory:
        trial = trial_loss(unet, autoencoder, schedule, config.objective, latents.data, context)
        wanted, shape = shape.per_process, probe(unet, trial, optimizer, shape, accelerator)
        if shape.per_process < wanted:
            notes.append(halved_note(wanted, shape))
    if accelerator.is_main_process:
        save_config(config)
        write_environment(output, environment(accelerator))
    tracker = Tracker(
        output, first_step, config.loop, accelerator.is_main_process, partial(more_writers, config)
    )
    notes += [trainee.about()] if trainee.adds else []
    notes += on_the_example(config.data)
    notes += recut + nothing_left + none_held_out(latents, config)
    notes += never_at_peak(config.optimizer, config.loop.max_steps)
    for note in notes + long_captions(latents, components.text_encoder):
        tracker.say(note)
    make_batch = BatchMaker(
        latents.data,
        make_order(latents.data, latents.train, config.loop.seed, shape.total),
        shape,
        context,
        config.objective,
        schedule,
        accelerator.device,
        config.captions,
    )
    validate = Validator(config, components, latents, context, ema, tracker, accelerator, unet)
    optimizer_step = OptimizerStep(
        accelerator,
        model,
        prepared_optimizer,
        lambda step: learning_rate(step, config.optimizer, config.loop.max_steps),
        config.optimizer.clip_norm,
        shape.accumulation,
    )
    if validate.due(first_step):
        validate(first_step)

    done = first_step
    for step, batch in training_loop(
        optimizer_step,
        make_batch,
        shape,
        config.loop,
        tracker,
        state.save,
        first_step,
        seconds,
        gauges,
        lambda done: validate(done) if validate.due(done) else None,
    ):
        x_0 = autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        loss = per_sample_loss(
            model, x_0, batch.context, batch.draw, schedule, config.objective, batch.mask
        ).mean()
        step.backward(loss)
        if step.update():
            ema.update(step.number)
            with tracker.going_on("a stored average"):
                powers.update(step.number)
            done = step.number + 1

    if not validate.due(done):
        validate(done)
    with tracker.going_on("a stored average"):
        powers.store(done)
    tracker.say(f"peak memory: {peak_memory(accelerator.device) / MEBI:.0f} MB")
    tracker.close()
    written = export_trained(config, components, trainee, ema, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock is not None:
        lock.close()
    return ending(config, written, trainee)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="configuration keys (given as key=value):\n\n" + describe(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file over the defaults listed below")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        end = train(read_config(options.config, options.overrides), options.resume)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{RAN_OUT} ({str(error).splitlines()[0]})") from error
    if is_first_process():
        print(end)


if __name__ == "__main__":
    sys.exit(main())
