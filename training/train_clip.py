"""Train a small CLIP on captioned pictures: its vocabulary, its text tower, its image tower.

    accelerate launch training/train_clip.py [--config FILE] [--resume] [a.b=value ...]

With no argument it trains the embedded default's. It ends with OUTPUT/text_encoder,
OUTPUT/tokenizer (what a text-to-image model needs) and OUTPUT/clip (both towers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from latentdiff.cli.arguments import command_line
from latentdiff.data.images import to_tensor
from latentdiff.data.source import Source, open_source
from latentdiff.errors import UserError, command
from latentdiff.files import whole_folder
from latentdiff.models.tokenizer import load_tokenizer
from latentdiff.train.clip import (
    ClipFeatures,
    ClipTrainConfig,
    contrastive_loss,
    load_or_build,
    retrieval_accuracy,
    same_look_indices,
    save_clip,
    start_folder,
    train_tokenizer,
    trim_padding,
)
from latentdiff.train.distributed import on_first, start_processes
from latentdiff.train.stage import (
    Readable,
    Stage,
    adamw,
    check_stage_output,
    prefetch,
    process_part,
    sample_indices,
)
from latentdiff.train.teacher import open_teacher

CONFIG = Path(__file__).parent / "configs" / "clip.yaml"


def batch_maker(
    source: Source, config: ClipTrainConfig, part: slice
) -> Callable[[int], tuple[Tensor, list[str]]]:
    """Return step → (pictures, captions); which of several captions is drawn from (seed, step)."""
    stage, data, readable = config.stage, config.data, Readable(source)
    looks = group_by_look(source, stage.batch_size) if config.same_look else {}

    def make(step: int) -> tuple[Tensor, list[str]]:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        draws = torch.rand(stage.batch_size, generator=generator)[part].tolist()
        if looks:
            chosen = same_look_indices(looks, stage.batch_size, generator)[part]
        else:
            order = sample_indices(step, len(source), stage.batch_size, stage.seed)
            chosen = order[part].tolist()
        examples = [readable[i] for i in chosen]
        texts = [e.captions[int(u * len(e.captions))] for e, u in zip(examples, draws, strict=True)]
        images = torch.stack(
            [
                to_tensor(e.image, data.image_size, data.crop, background=data.background)
                for e in examples
            ]
        )
        return images, texts

    return make


def group_by_look(source: Source, batch_size: int) -> dict[str, list[int]]:
    """Group a source's pictures by what it says that they share.

    Raises: UserError: when the source does not say, or no group fills a batch.
    """
    look = getattr(source, "look", None)
    if look is None:
        raise UserError("same_look needs a source that knows styles, such as data.kind=emoji.")
    groups: dict[str, list[int]] = {}
    for index in range(len(source)):
        groups.setdefault(look(index), []).append(index)
    largest = max(len(members) for members in groups.values())
    if largest < batch_size:
        raise UserError(
            f"same_look: the largest group has {largest} pictures, fewer than stage.batch_size="
            f"{batch_size}. Lower stage.batch_size to {largest} or less."
        )
    return groups


def prepare_vocabulary(source: Source, config: ClipTrainConfig) -> None:
    """Write OUTPUT/tokenizer: the earlier run's, or one learnt from all captions."""
    folder = Path(config.stage.output) / "tokenizer"
    if (folder / "tokenizer.json").exists():
        return
    start = start_folder(config)
    if start is not None:
        tokenizer = load_tokenizer(start / "tokenizer", config.clip.max_tokens)
    else:
        captions = (text for i in range(len(source)) for text in source.captions(i))
        tokenizer = train_tokenizer(captions, config.clip.vocabulary, config.clip.max_tokens)
    with whole_folder(folder) as new:
        tokenizer.save(new)


def train(config: ClipTrainConfig, resume: bool) -> None:
    """Run the stage: embed both sides, contrast, step; then export both towers."""
    stage_config, output = config.stage, Path(config.stage.output)
    accelerator = start_processes(stage_config.mixed_precision)
    torch.manual_seed(stage_config.seed)
    check_stage_output(stage_config, resume)
    source = open_source(config.data)
    on_first(lambda: prepare_vocabulary(source, config))
    tokenizer = load_tokenizer(output / "tokenizer", config.clip.max_tokens)
    clip = load_or_build(config, tokenizer)
    model = accelerator.prepare(ClipFeatures(clip))
    width = int(clip.config.text_config.hidden_size)
    teacher = open_teacher(config, width, accelerator.device)
    modules = {"clip": clip} | ({"teacher": teacher} if teacher else {})
    optimizers = {name: adamw(m, stage_config, (0.9, 0.98)) for name, m in modules.items()}
    stage = Stage(modules, optimizers, stage_config, accelerator)
    first = stage.resume(resume)
    make = batch_maker(source, config, process_part(stage_config, accelerator))
    for step, (images, texts) in prefetch(make, first, stage_config.max_steps):
        images = images.to(accelerator.device)
        token_ids = trim_padding(tokenizer(texts)).to(accelerator.device)
        stage.set_rate(step)
        with accelerator.autocast():
            image_vectors, text_vectors, scale = model(images, token_ids)
        everyone = (accelerator.gather(image_vectors), accelerator.gather(text_vectors))
        start = accelerator.process_index * len(images)
        loss = contrastive_loss(image_vectors, text_vectors, scale, *everyone, start)
        losses = {"loss": loss}
        if teacher:
            with accelerator.autocast():
                losses["teacher_loss"] = teacher.loss(clip, tokenizer, texts, step)
            loss = loss + config.teacher_weight * losses["teacher_loss"]
        stage.step(list(modules), loss)
        top_1 = retrieval_accuracy(text_vectors, image_vectors, 1)
        stage.log(step, {**losses, "batch_top1": torch.tensor(top_1), "scale": scale})
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    on_first(lambda: save_clip(clip.float().cpu().eval(), output))
    if accelerator.is_main_process:
        print(f"text encoder, tokenizer and both towers written to {output}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    train(*command_line(ClipTrainConfig, CONFIG, __doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
