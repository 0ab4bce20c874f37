"""Prompts that name nothing a model knows: which they are, and what is nearest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.models.known_things import warn_of_unknown_things
from tests.random_models import make_pipeline

KNOWN = ("cat", "hot dog", "cherry", "knife", "leaf", "C-3 (droid)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"known_things": KNOWN}))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


def said(pipeline: LatentDiffusionPipeline, texts: list[str], known: tuple[str, ...]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_unknown_things(pipeline.text_encoder, texts, known)
    return [str(warning.message) for warning in found]


NAMED = ["a Cat", "two cats", "(cat:1.2)", "HOT DOGS", "red cherries", "cat,", "knives", "  "]
NAMED += ["two leaves and a leaf", "a c-3 (droid) on Mars", ""]
UNNAMED = ["concatenate", "a dog", "hot", "a car", "c-3 droid", "leave"]


@pytest.mark.parametrize("text", [*NAMED, *UNNAMED])
def test_which_prompts_name_a_known_thing(pipeline, text: str) -> None:
    assert len(said(pipeline, [text, text], KNOWN)) == (text in UNNAMED)
    assert said(pipeline, [text], ()) == []


def test_the_nearest_are_those_of_the_end_tokens_states(pipeline) -> None:
    encoder = pipeline.text_encoder

    def end_state(text: str) -> torch.Tensor:
        return encoder.encode([text])[0, encoder.count_tokens(text) - 1]

    with torch.no_grad():
        states = torch.stack([end_state(text) for text in (*KNOWN, "a dog")])
    states -= states[:-1].mean(0)
    cosines = F.cosine_similarity(states[:-1], states[-1:])
    nearest = ", ".join(KNOWN[k] for k in cosines.argsort(descending=True)[:3])
    assert said(pipeline, ["a dog"], KNOWN) == [
        f"the prompt 'a dog' names nothing that this model lists as known; the nearest known "
        f"things are {nearest}."
    ]
    assert "things are cat." in said(pipeline, ["a dog"], ("cat",))[0]


def test_a_models_folder_says_what_it_knows(folder: Path, pipeline, tmp_path: Path) -> None:
    for target in (tmp_path / "again", tmp_path / "one.safetensors"):
        pipeline.save_pretrained(target)
        again = LatentDiffusionPipeline.from_pretrained(target)
        assert again.components.sampling.known_things == KNOWN
    with pytest.warns(UserWarning, match="the nearest known") as found:
        pipeline(
            ["a dog", "a cat"],
            negative_prompt="fog",
            num_inference_steps=1,
            timestep_spacing="trailing",
            progress=False,
        )
    messages = [text for w in found if "names nothing" in (text := str(w.message))]
    assert [text.split("'")[1] for text in messages] == ["a dog"]


@pytest.mark.parametrize("things", ["cat", [1], [""], {"cat": 1}])
def test_other_than_a_list_of_names_is_refused(tmp_path: Path, things) -> None:
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"known_things": things}))
    with pytest.raises(UserError, match=r"known_things in .* must be a list of names"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)
