"""Train a small CLIP on captioned images: its vocabulary, its text tower, its image tower.

    accelerate launch training/train_clip.py [--config FILE] [--resume] [a.b=value ...]

With no argument it trains on examples/twemoji. It ends with OUTPUT/text_encoder,
OUTPUT/tokenizer (what a text-to-image model needs) and OUTPUT/clip (both towers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from latentdiff.data.images import to_tensor
from latentdiff.data.source import Readable, Source, open_source
from latentdiff.errors import UserError, command
from latentdiff.files import whole_folder
from latentdiff.models.tokenizer import ClipTokenizer, load_tokenizer
from latentdiff.train.arguments import command_line
from latentdiff.train.batches import BatchShape, to_device
from latentdiff.train.clip import (
    ClipFeatures,
    ClipTrainConfig,
    contrastive_loss,
    load_or_build,
    retrieval_accuracy,
    save_clip,
    start_folder,
    train_tokenizer,
    trim_padding,
)
from latentdiff.train.distributed import on_first
from latentdiff.train.optimizer import make_optimizer
from latentdiff.train.run import Run, save_config
from latentdiff.train.teacher import Distillation, open_teacher, taught_texts

CONFIG = Path(__file__).parent / "configs" / "clip.yaml"


def batch_maker(
    source: Source, tokenizer: ClipTokenizer, run: Run[ClipTrainConfig]
) -> Callable[[int, int], tuple[Tensor, list[str], Tensor]]:
    """Return (step, micro-batch) → (images, captions, their token ids (B, tokens)).

    Which of several captions it is is drawn from (seed, step).
    """
    config, shape, readable = run.config, run.shape, Readable(source)
    data = config.data
    device, order = run.accelerator.device, run.order(range(len(source)))

    def make(step: int, micro: int) -> tuple[Tensor, list[str], Tensor]:
        generator, part = run.generator(step), shape.part(micro)
        draws = torch.rand(shape.total, generator=generator)[part].tolist()
        examples = [readable[i] for i in order(shape.samples(step, micro))]
        texts = [e.captions[int(u * len(e.captions))] for e, u in zip(examples, draws, strict=True)]
        images = torch.stack(
            [
                to_tensor(e.image, data.image_size, data.crop, background=data.background)
                for e in examples
            ]
        )
        token_ids = trim_padding(tokenizer(texts))
        return to_device(images, device), texts, to_device(token_ids, device)

    return make


def prepare_vocabulary(source: Source, config: ClipTrainConfig, taught: Sequence[str]) -> None:
    """Write OUTPUT/tokenizer: the earlier run's, or one learnt from captions and taught texts."""
    folder = Path(config.output) / "tokenizer"
    if (folder / "tokenizer.json").exists():
        return
    start = start_folder(config)
    if start is not None:
        tokenizer = load_tokenizer(start / "tokenizer", config.clip.max_tokens)
    else:
        captions = (text for i in range(len(source)) for text in source.captions(i))
        tokenizer = train_tokenizer(
            chain(captions, taught), config.clip.vocabulary, config.clip.max_tokens
        )
    save_config(config)  # first, so that --resume finds a run from here on
    with whole_folder(folder) as new:
        tokenizer.save(new)


def check_step(shape: BatchShape) -> None:
    """Raises: UserError: a step is cut into micro-batches."""
    if shape.accumulation > 1:
        raise UserError(
            "the contrastive loss compares all images of a step with each other, so a step "
            f"cannot be cut into {shape.accumulation} micro-batches. Set loop.batch_size="
            f"{shape.total // shape.processes} and loop.gradient_accumulation=1."
        )


def train(config: ClipTrainConfig, resume: bool) -> None:
    """Embed both sides, contrast, step; then export both towers."""
    output = Path(config.output)
    run = Run(config, resume)
    accelerator = run.accelerator
    check_step(run.shape)
    run.open_output()
    torch.manual_seed(config.loop.seed)
    source = open_source(config.data)
    sentences = open_teacher(config, accelerator.device)
    taught = taught_texts(config, sentences) if sentences else []
    on_first(lambda: prepare_vocabulary(source, config, taught))
    tokenizer = load_tokenizer(output / "tokenizer", config.clip.max_tokens)
    clip = load_or_build(config, tokenizer)
    model = accelerator.prepare(ClipFeatures(clip))
    width = int(clip.config.text_config.hidden_size)
    teacher = Distillation(width, sentences, taught, config.loop.seed) if sentences else None
    distill = accelerator.prepare(teacher) if teacher else None
    models = {"clip": clip} | ({"teacher": teacher} if teacher else {})
    optimizers = {name: make_optimizer(module, config.optimizer) for name, module in models.items()}
    prepared = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    clip_step = run.optimizer_step(model, prepared["clip"])
    others = {"teacher": run.optimizer_step(distill, prepared["teacher"])} if distill else {}
    facts = {"images": source.fingerprint(), "models": ", ".join(models)}
    run.load_state(models, optimizers, facts)
    run.open_log()
    make_batch = batch_maker(source, tokenizer, run)

    for step, (images, texts, token_ids) in run.loop(clip_step, make_batch, others=others):
        with accelerator.autocast():
            image_vectors, text_vectors, scale = model(images, token_ids)
        everyone = (accelerator.gather(image_vectors), accelerator.gather(text_vectors))
        start = accelerator.process_index * len(images)
        loss = contrastive_loss(image_vectors, text_vectors, scale, *everyone, start)
        if distill:
            with accelerator.autocast():
                distilled = distill(clip, tokenizer, texts, step.number)
            step.log(contrastive_loss=loss, teacher_loss=distilled)
            loss = loss + config.teacher_weight * distilled
        step.backward(loss)
        step.update()
        if distill:
            others["teacher"].update(step.number)  # its gradient is of the same loss
        top_1 = retrieval_accuracy(text_vectors, image_vectors, 1)
        step.log(batch_top1=top_1, scale=scale)

    run.tracker.close()
    on_first(lambda: save_clip(clip.float().cpu().eval(), output))
    run.end()
    if accelerator.is_main_process:
        print(f"text encoder, tokenizer and both towers written to {output}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    train(*command_line(ClipTrainConfig, CONFIG, __doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
