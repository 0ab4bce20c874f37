"""Teach a text tower what things look like, before the U-Net is trained on it. Two lessons:

    python training/teach_drawing.py --config training/configs/drawing_whole.yaml
    python training/teach_drawing.py [--config training/configs/drawing.yaml] [--resume] [a.b=value]

With start=RUN of a second lesson it goes on with that one, from a tower that draws already.

The second ends with OUTPUT/text_encoder, OUTPUT/tokenizer and, unless clip_weight is 0,
OUTPUT/clip_head.safetensors; U-Nets trained on another tower do not fit it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.command_line import command_line
from latentdiff.data.source import Source, open_source
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, exit_with
from latentdiff.formats.diffusers_folder import save_text_encoder
from latentdiff.models.clip_scorer import HEAD, scorer_text_tower
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.trainer.drawing import (
    DrawingConfig,
    Lesson,
    PatchLesson,
    WholeLesson,
    check_room,
    check_same_tower,
    new_tower,
    patches,
    rows_with_patches,
    short_rows,
)
from latentdiff.trainer.drawing_data import OldFeatures, Texts, subject_pictures
from latentdiff.trainer.optimizer import OptimizerConfig, make_optimizer
from latentdiff.trainer.processes import start_one_process
from latentdiff.trainer.stage import Stage, check_stage_output, prefetch
from latentdiff.trainer.unfolding import fitted_reader, principal_head, unfolding

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG = Path(__file__).parent / "configs" / "drawing.yaml"
#: Texts are computed in this many groups of similar length on a CPU, where padding costs as much as
#: words; a GPU has more from fewer, larger products.
GROUPS = 4
#: Texts per step that the old tower reads too.
CLIP_TEXTS = 48
#: Texts that the start of the second lesson is fitted to.
START_TEXTS = 300


def make_lesson(
    config: DrawingConfig, old: TextEncoder, pictures: Tensor, texts: Sequence[str], projection: int
) -> Lesson:
    """The lesson that the configuration asks for, with its tower as it starts.

    Args: texts: some captions, for the start of the second lesson.
    """
    channels, height, width = pictures.shape[1:]
    count = (height // config.patch) * (width // config.patch)
    layers = config.tower.layers - 1
    tower = new_tower(config.tower, layers, old.module, count)
    whole = WholeLesson(tower, channels * height * width, projection)
    if config.start is None:
        principal_head(whole.head, pictures.flatten(1))
        return whole
    file = Path(config.start) / "lesson.safetensors"
    if not file.is_file():
        raise UserError(f"start={config.start}: there is neither {file.name} nor text_encoder/. "
                        "Has the lesson ended?")  # fmt: skip
    whole.load_state_dict(load_file(file))
    tower.config["num_hidden_layers"] = layers
    size = channels * config.patch**2
    order = patches(torch.arange(channels * height * width).view(1, channels, height, width),
                    config.patch)[0]  # fmt: skip
    lesson = PatchLesson(tower, size, projection, config.patch)
    lesson.head = unfolding(tower, whole.head, order, old.tokenizer(texts))
    lesson.projection.load_state_dict(whole.projection.state_dict())
    return lesson


def further_lesson(
    start: Path, draw: Texts, pictures: Tensor, config: DrawingConfig, projection: int
) -> PatchLesson:
    """The second lesson, gone on with from a tower that draws; its head is fitted anew.

    Args:   start: a folder with the tower in text_encoder/.  draw: the texts, to fit the head with.
    Raises: UserError: the tower is not what the configuration says, or should keep its CLIP.
    """
    if config.clip_weight:
        raise UserError(
            f"clip_weight={config.clip_weight:g}: a tower that goes on learning to draw keeps no "
            "place in a CLIP, since its projection into it is not stored. Set clip_weight=0."
        )
    side = config.patch
    found = load_text_encoder(start / "text_encoder", start / "tokenizer")
    check_same_tower(found, config.tower, draw.tokenizer, start)
    tower = found.module.float().requires_grad_(True)
    _, ids, rows = draw(0, START_TEXTS)
    wanted = patches(pictures[rows], side)
    lesson = PatchLesson(tower, wanted.shape[2], projection, side)
    lesson.head = fitted_reader(tower, ids, wanted)
    return lesson


def begin(
    config: DrawingConfig,
    text: TextEncoder,
    source: Source,
    draw: Texts,
    pictures: Tensor,
    space: int,
) -> Lesson:
    """The lesson of this run, at its start.

    Args: text: the old tower, with a tokenizer of the new length.  space: the CLIP's dimensions.
    """
    start = Path(EMBEDDED_MODEL if config.start == "embedded" else config.start or "")
    if config.start and (start / "text_encoder").is_dir():
        return further_lesson(start, draw, pictures, config, space)
    some = range(0, len(source), max(1, len(source) // START_TEXTS))
    captions = [source.captions(i)[-1] for i in some]
    return make_lesson(config, text, pictures, captions, space)


class Teaching:
    """One lesson: draws texts, shows pictures, adds up the gradients of a step."""

    def __init__(
        self, config: DrawingConfig, lesson: Lesson, pictures: Tensor, features: OldFeatures,
        draw: Texts,
    ) -> None:  # fmt: skip
        self.config, self.lesson, self.pictures = config, lesson, pictures
        self.device = pictures.device
        self.features, self.draw = features, draw
        self.patch_count = patches(pictures[:1], config.patch).shape[1]

    def rows(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and ends, without the padding that this lesson does not look at."""
        end = self.draw.tokenizer.end_id
        if self.config.start is None:
            return short_rows(ids, end, generator)
        return rows_with_patches(ids, end, self.patch_count)

    def prepare(self, step: int) -> tuple[list[str], Tensor, Tensor]:
        """The texts of a step, with their ids and picture rows."""
        return self.draw(step, self.config.stage.batch_size)

    def gradients(
        self, step: int, drawn: tuple[list[str], Tensor, Tensor], accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """Backward of one step, in groups of texts of similar length. Returns: the losses."""
        texts, ids, places = drawn
        generator = torch.Generator().manual_seed(self.config.stage.seed * 7_919 + step)
        errors, distances = [], []
        groups = GROUPS if self.device.type == "cpu" else 1
        for part in torch.arange(len(ids)).chunk(groups):
            # The rows whose old features are compared come first.
            every = max(1, len(ids) // CLIP_TEXTS)
            judged = part[::every] if self.config.clip_weight else part[:0]
            others = part[~torch.isin(part, judged)]
            lead = torch.cat([judged, others])
            wanted = self.features([texts[i] for i in judged.tolist()]).to(self.device)
            rows = tuple(t.to(self.device) for t in self.rows(ids[lead], generator))
            with accelerator.autocast():
                error, distance = self.lesson(
                    rows, self.pictures[places[lead].to(self.device)], wanted
                )
            share = len(part) / len(ids)
            accelerator.backward((error + self.config.clip_weight * distance) * share)
            errors.append(error.detach() * share)
            distances.append(distance.detach() * share)
        return {"error": torch.stack(errors).sum(), "clip": torch.stack(distances).sum()}


def train(config: DrawingConfig, resume: bool) -> None:
    """Encode the pictures, teach, write the lesson's result."""
    stage_config, output = config.stage, Path(config.stage.output)
    accelerator = start_one_process(stage_config.mixed_precision)
    check_stage_output(stage_config, resume)
    torch.manual_seed(stage_config.seed)
    root = EMBEDDED_MODEL if config.model == "embedded" else Path(config.model)
    if not (root / HEAD).is_file():
        raise UserError(f"model={root} has no {HEAD}: its text tower is not half of a CLIP.")
    old = scorer_text_tower(root)
    head = load_file(root / HEAD)
    source = open_source(config.data)
    pictures, rows = subject_pictures(source, config.data, root, accelerator.device)
    channels, height, width = pictures.shape[1:]
    check_room((channels, height, width), config.patch, config.tower)
    longer = scorer_text_tower(root)
    longer.tokenizer.max_length = config.tower.max_tokens
    draw = Texts(source, rows, longer.tokenizer, stage_config.seed)
    lesson = begin(config, longer, source, draw, pictures, len(head["text_projection.weight"]))
    lesson.to(accelerator.device)
    shape = OptimizerConfig(kind="muon", lr=stage_config.learning_rate, momentum=config.momentum,
                            weight_decay=stage_config.weight_decay)  # fmt: skip
    stage = Stage(
        {"lesson": lesson}, {"lesson": make_optimizer(lesson, shape)}, stage_config, accelerator
    )
    features = OldFeatures(old, head)
    teaching = Teaching(config, lesson, pictures.to(accelerator.device), features, draw)
    first = stage.resume(resume)
    for step, drawn in prefetch(teaching.prepare, first, stage_config.max_steps):
        stage.set_rate(step)
        losses = teaching.gradients(step, drawn, accelerator)
        stage.update(["lesson"])
        stage.log(step, losses)
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    save(lesson.cpu(), config, longer, head, output)


def save(
    lesson: Lesson, config: DrawingConfig, text: TextEncoder, head: dict[str, Tensor], output: Path
) -> None:
    """Write what the next step of the recipe reads."""
    if config.start is None:
        save_file({k: v.contiguous() for k, v in lesson.state_dict().items()},
                  output / "lesson.safetensors")  # fmt: skip
        print(f"first lesson written to {output}; now: teach_drawing.py start={output}")
        return
    tower = TextEncoder(lesson.tower.eval().requires_grad_(False), text.tokenizer)
    save_text_encoder(tower, output / "text_encoder")
    text.tokenizer.save(output / "tokenizer")
    if config.clip_weight:
        projection = lesson.projection.weight.detach().half().contiguous()
        save_file({**head, "text_projection.weight": projection}, output / HEAD)
    written = (
        "text encoder, tokenizer and CLIP head"
        if config.clip_weight
        else "text encoder and tokenizer"
    )
    print(f"{written} written to {output}")


if __name__ == "__main__":
    try:
        train(*command_line(DrawingConfig, CONFIG, __doc__))
    except UserError as error:
        exit_with(error)
