"""Long and weighted prompts through the whole pipeline."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.models.prompts import encode_prompts
from tests.random_models import make_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 3, "progress": False, "output_type": "pt"}
LONG = "a cat and a dog, then some more words: pain pain pain (dog:1.4) cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


def test_neighbours_of_other_lengths_do_not_change_an_image(
    pipeline: LatentDiffusionPipeline,
) -> None:
    prompts, negatives = ["a cat", LONG, "dog BREAK cat"], [LONG, "", "pain"]
    call = {**FAST, "prompt_syntax": "a1111", "num_images_per_prompt": 2}
    many = pipeline(prompts, negative_prompt=negatives, guidance_scale=[2, 5, 1], seed=3, **call)
    assert many.seeds == list(range(3, 9))
    assert [len(read.chunks) for read in many.prompts] == [1, 3, 2]
    for k in range(3):
        alone = pipeline(
            prompts[k],
            negative_prompt=negatives[k],
            guidance_scale=[2, 5, 1][k],
            seed=3 + 2 * k,
            **call,
        ).images
        assert (alone - many.images[2 * k : 2 * k + 2]).abs().max() <= 1 / 255
        assert alone.std() > 0.02


def test_plain_text_gives_the_same_image_in_every_reading(
    pipeline: LatentDiffusionPipeline,
) -> None:
    plain = pipeline("a cat", negative_prompt="dog", seed=0, **FAST).images
    for syntax in ("long", "a1111"):
        found = pipeline("a cat", negative_prompt="dog", seed=0, prompt_syntax=syntax, **FAST)
        assert torch.equal(found.images, plain)


def test_words_that_plain_cuts_off_count_in_long(pipeline: LatentDiffusionPipeline) -> None:
    call = {**FAST, "seed": 0}
    long, longer = "cat " * 14, "cat " * 14 + "dog"
    with pytest.warns(UserWarning, match="cut off: 'dog'"):
        cut = pipeline(longer, **call)
    assert cut.prompts[0].left_out == "dog"
    assert torch.equal(cut.images, pipeline(long, **call).images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = pipeline(longer, prompt_syntax="long", **call)
    assert whole.prompts[0].tokens == 15 and not whole.prompts[0].left_out
    assert (whole.images - cut.images).abs().max() > 2 / 255


def test_diffusers_draws_the_same_from_these_states(
    folder: Path, pipeline: LatentDiffusionPipeline
) -> None:
    """diffusers takes states of any length, both of the same."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    negative = "pain BREAK dog BREAK [cat]"
    with torch.no_grad():
        read = [pipeline.read_prompt(text, "a1111") for text in (LONG, negative)]
        states = encode_prompts(pipeline.text_encoder, read)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "latents": noise}
    expected = theirs(
        prompt_embeds=states[0][None], negative_prompt_embeds=states[1][None], **options
    ).images[0]
    ours = pipeline(
        LONG, negative_prompt=negative, prompt_syntax="a1111", progress=False, **options
    ).images[0]
    difference = np.abs(np.asarray(ours, int) - np.asarray(expected, int))
    assert difference.max() <= 2 and np.asarray(ours).std() >= 20


def test_the_model_s_own_chunks_are_kept(
    folder: Path, pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "generation_config.json"
    assert not file.exists()
    file.write_text(json.dumps({"chunk_tokens": 5}))
    own = LatentDiffusionPipeline.from_pretrained(tmp_path / "own")
    own.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == {
        "chunk_tokens": 5
    }
    assert [len(p.read_prompt("cat " * 12).chunks) for p in (pipeline, own)] == [1, 3]
    file.write_text(json.dumps({"chunk_tokens": 0}))
    with pytest.raises(UserError, match=r"chunk_tokens in .* whole number of at least 1; got 0"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_syntax": "a111"}, "Did you mean 'a1111'"),
        ({"prompt": "[a:b:3]", "prompt_syntax": "a1111"}, "step to step"),
        ({"negative_prompt": "a AND b", "prompt_syntax": "a1111"}, "AND in capitals"),
    ],
)
def test_bad_prompts(
    pipeline: LatentDiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    try:
        with pytest.raises(UserError, match=message):
            pipeline(**{"prompt": "a cat", **FAST, **arguments})
    finally:
        hook.remove()
