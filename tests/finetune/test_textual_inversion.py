"""Training a word: only its vectors move, and a resumed run is the same run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from random_models import TEXT_WIDTH, make_pipeline  # noqa: E402
from tiny_training import losses, make_images  # noqa: E402

from latentdiff.errors import UserError  # noqa: E402
from latentdiff.finetune.textual_inversion import (  # noqa: E402
    TemplateCaptions,
    TextualInversion,
    TextualInversionConfig,
    starting_vectors,
)
from latentdiff.formats.folder import load_components  # noqa: E402

FILE = "learned_embeds.safetensors"
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    make_pipeline().save_pretrained(folder / "model")
    make_images(folder / "images", 8)
    return folder


def given(folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"model.pretrained={folder / 'model'}",
        "finetune={kind: textual_inversion, token: <sq>, vectors: 2, initial: cat}",
        "data.kind=folder",
        f"data.path={folder / 'images'}",
        "data.validation_share=0.25",
        f"latents.cache_dir={folder / 'cache'}",
        "objective.condition_dropout=0.3",
        "optimizer.lr=1e-2",
        "optimizer.warmup_steps=2",
        "loop.mixed_precision=no",
        f"loop.max_steps={STEPS}",
        "loop.batch_size=3",
        "loop.gradient_accumulation=2",
        "loop.ema_decay=0.9",
        "loop.checkpoint_every=3",
        "loop.log_every=2",
        "loop.tensorboard=false",
        "validation.every=0",
        "validation.samples=2",
        "validation.steps=1",
        "validation.images=1",
        f"output={folder / name}",
        *more,
    ]


def test_only_the_new_rows_move(folder: Path) -> None:
    parts: Any = load_components(folder / "model")
    config = TextualInversionConfig(token="<sq>", vectors=2, initial="cat dog")
    table = parts.text_encoder.module.embeddings.token_embedding.weight.clone()
    start = starting_vectors(parts.text_encoder, "cat dog", 2)
    ids = [ids[0] for ids in parts.text_encoder.tokenizer.pieces("cat dog")]
    assert torch.equal(start, table[ids])
    states = parts.text_encoder.encode(["a cat"])
    method = TextualInversion(parts, config)
    assert [p.shape for p in method.trained().values()] == [(2, TEXT_WIDTH)]
    before = {n: p.clone() for n, p in method.module.state_dict().items()}
    optimizer = torch.optim.AdamW(method.trained().values(), lr=0.1, weight_decay=0.1)
    said = method.encode(["a square", ""])
    for _ in range(3):
        y = method.module(torch.ones(2, 4, 16, 16), torch.tensor([5, 900]), said)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [n for n, p in method.module.state_dict().items() if not torch.equal(p, before[n])]
    assert changed == ["text_encoder.module.embeddings.token_embedding.vectors"]
    assert torch.equal(parts.text_encoder.encode(["a cat"]), states)


def test_captions_are_said_with_the_word(folder: Path) -> None:
    parts = load_components(folder / "model")
    TextualInversion(parts, TextualInversionConfig(token="<sq>"))
    captions = TemplateCaptions(parts.text_encoder.tokenizer, "<sq>", "a {caption} by {token}")
    assert [captions.fill(text) for text in ("{cat}", "", "the <SQ> dog")] == [
        "a {cat} by <sq>",
        "",
        "the <SQ> dog",
    ]
    assert captions.fill("cat " * 40) == "a " + "cat " * 10 + "by <sq>"  # `by` is two tokens here
    new = parts.text_encoder.tokenizer.backend.token_to_id("<sq>")
    assert (captions(["cat " * 40]) == new).sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "cat"}, "knows already"),
        ({"vectors": 9}, "finetune.vectors must be at most 8"),
    ],
)
def test_what_cannot_be_trained(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextualInversion(load_components(folder / "model"), TextualInversionConfig(**changes))
    bad = TextualInversionConfig(token="a b", vectors=0, template="no word").validate()
    assert [problem.split()[0] for problem in bad] == ["token", "vectors", "template"]


def test_a_run_writes_the_word_and_a_resumed_one_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_latent import main

    from latentdiff import LatentDiffusionPipeline

    assert main(given(folder, "straight")) == 0
    said = capsys.readouterr().out
    assert f"--embedding {folder / 'straight' / FILE}" in said
    assert 'in the style of <sq>" --model' in said  # the prompt has the word, ready to be copied
    assert main(given(folder, "resumed", "loop.max_steps=4")) == 0
    assert main([*given(folder, "resumed"), "--resume"]) == 0
    assert losses(folder / "straight") == losses(folder / "resumed")
    one, two = (folder / name / FILE for name in ("straight", "resumed"))
    assert one.read_bytes() == two.read_bytes()
    stored = load_file(folder / "straight/checkpoints" / f"step-{STEPS:08d}" / "unet.safetensors")
    assert [tensor.shape for tensor in stored.values()] == [(2, TEXT_WIDTH)]
    pipeline = LatentDiffusionPipeline.from_pretrained(folder / "model")
    start = starting_vectors(pipeline.text_encoder, "cat", 2)
    assert pipeline.load_embedding(folder / "straight") == "<sq>"
    assert (load_file(one)["<sq>"] - start).abs().min() > 1e-4
    again = given(folder, "resumed", "finetune.template=a {token}")
    assert main([*again, "--resume"]) == 2
    assert "finetune.template" in capsys.readouterr().err
