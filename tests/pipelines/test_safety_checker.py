"""The safety checker flags what diffusers' flags, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline

CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "progress": False}


def make_checker(images: torch.Tensor) -> Any:
    """diffusers' class with random weights and thresholds that part these pixels about in half."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 24,
              "num_attention_heads": 2, "patch_size": 8}  # fmt: skip
    checker: Any = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    with torch.no_grad():
        pooled = checker.vision_model(images)[1]
        embedding = F.normalize(checker.visual_projection(pooled), dim=1)
        for kind in ("concept", "special_care"):
            known = getattr(checker, f"{kind}_embeds")
            known.copy_(torch.randn_like(known))
            scores = embedding @ F.normalize(known, dim=1).T
            share = 0.97 if kind == "concept" else 0.8
            getattr(checker, f"{kind}_embeds_weights").copy_(scores.quantile(share, dim=0))
    return checker.eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(48, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(pixels: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    make_checker(pixels).save_pretrained(folder / "safety_checker")
    return folder


def test_the_same_images_are_flagged(folder: Path, pixels: torch.Tensor) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    pipeline.load_safety_checker(folder)
    assert pipeline.safety_checker is not None
    _, expected = make_checker(pixels)(pixels, torch.zeros(48, 3, 1, 1))
    found = pipeline.safety_checker.flagged(pixels)
    assert found == expected
    assert 5 < sum(found) < 43


@pytest.mark.parametrize("size", [(24, 24), (40, 31), (64, 100)])
def test_images_are_prepared_as_by_clips_processor(folder: Path, size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    pipeline.load_safety_checker(folder / "safety_checker")
    assert pipeline.safety_checker is not None
    unit = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    unit = F.interpolate(unit, size=size, mode="bicubic").clamp(0, 1)
    sides = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = CLIPImageProcessor(**sides)
    images = [(one.permute(1, 2, 0) * 255).round().byte().numpy() for one in unit]
    expected = processor(images=images, return_tensors="pt").pixel_values
    found = pipeline.safety_checker.prepared(unit * 2 - 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_it_is_off_unless_asked_for_and_images_stay(folder: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    plain = pipeline("a cat", seed=0, num_images_per_prompt=3, **CALL)
    assert plain.flagged is None
    pipeline.load_safety_checker(folder)
    assert pipeline.safety_checker is not None
    for weight, flagged in ((-1.0, [True] * 3), (2.0, [False] * 3)):
        pipeline.safety_checker.concept_embeds_weights.fill_(weight)
        found = pipeline("a cat", seed=0, num_images_per_prompt=3, **CALL)
        assert found.flagged == flagged
        assert torch.equal(found.images, plain.images)
    assert pipeline("a cat", seed=0, **{**CALL, "output_type": "latent"}).flagged is None


def test_what_is_no_checker_is_refused(folder: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=r"no safety checker at .*unet: expected config\.json"):
        pipeline.load_safety_checker(folder / "unet")
    shutil.copytree(folder / "safety_checker", tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "cut" / "model.safetensors"
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"1 missing: tower\.visual_projection\.weight"):
        pipeline.load_safety_checker(tmp_path / "cut")
    assert pipeline.safety_checker is None
