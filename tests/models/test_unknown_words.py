"""Words that load nothing are told from learned ones and from mere signs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.models.prompts import add_word, warn_of_unknown_words
from tests.random_models import TEXT_WIDTH, make_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    folder: Path = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    add_word(pipeline.text_encoder, "<my-cat>", torch.ones(3, TEXT_WIDTH))
    return pipeline


def said(pipeline: LatentDiffusionPipeline, *texts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_unknown_words(pipeline.text_encoder.tokenizer, texts)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    "text",
    [
        *("a <my-cat>", "<MY-CAT>", "3 < 5 > 4", "<->", "<3", "a cat", "", ":)"),
        *("a (red) cat", "at 10:30", "a [b:1]", "(a: b)", "breakfast BREAKS", "(a:1.2.3)"),
    ],
)
def test_known_words_and_signs_are_left_alone(pipeline: LatentDiffusionPipeline, text: str) -> None:
    assert said(pipeline, text) == []


def test_unknown_words_are_named_once_each(pipeline: LatentDiffusionPipeline) -> None:
    found = said(pipeline, "a <my-dog> and <my-cat>", "<my-dog> <other>")
    assert [message.split("'")[1] for message in found] == ["<my-dog>", "<other>"]
    assert '--embedding "FILE=<my-dog>"' in found[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a (red:1.3) cat (blue:2)", "(red:1.3)"),
        ("((a, b: .5 ))", "(a, b: .5 )"),
        ("(red:-1)", "(red:-1)"),
        ("a BREAK b", "BREAK"),
    ],
)
def test_weights_of_a1111_say_how_they_are_read(
    pipeline: LatentDiffusionPipeline, text: str, shown: str
) -> None:
    [message] = said(pipeline, text, text)
    assert f"holds {shown!r}" in message and "prompt_syntax='a1111'" in message
    for syntax in ("a1111", "plain"):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pipeline(text, num_inference_steps=2, prompt_syntax=syntax, progress=False)
        assert [message] * (syntax == "plain") == [
            str(w.message) for w in found if "the prompt holds" in str(w.message)
        ]


def test_networks_of_a1111_say_how_they_are_loaded(pipeline: LatentDiffusionPipeline) -> None:
    [lora] = said(pipeline, "a cat <lora:fur:0.8>")
    assert "--lora fur.safetensors:0.8" in lora
    [plain] = said(pipeline, "a cat <lora:fur>")
    assert "--lora fur.safetensors:1" in plain
    [several] = said(pipeline, "a cat <lora:a/fur.safetensors:0.8:1.0>")
    assert "--lora a/fur.safetensors:0.8, or" in several and ", 0.8)" in several
    [named] = said(pipeline, "a cat <lora:fur:te=0.5>")
    assert "--lora fur.safetensors:1, or" in named
    [empty] = said(pipeline, "a cat <lora::1>")
    assert "--lora FILE:1" in empty
    [hyper] = said(pipeline, "a cat <hypernet:x:1>")
    assert "not supported" in hyper and "--lora" not in hyper


def test_the_pipeline_warns_of_prompts_negatives_and_inverted_images(
    pipeline: LatentDiffusionPipeline,
) -> None:
    with pytest.warns(UserWarning, match="'<dog>'"):
        pipeline("a cat", negative_prompt="<dog>", num_inference_steps=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="lora:fur"):  # and no warning that says otherwise
            pipeline("a <lora:fur:1>", prompt_syntax="a1111", num_inference_steps=2)
    with pytest.warns(UserWarning, match="'<dog>'"):
        pipeline.invert(torch.zeros(1, 3, 32, 32), "a <dog>", num_inference_steps=1)
