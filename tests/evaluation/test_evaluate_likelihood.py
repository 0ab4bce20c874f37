"""The likelihood of a data set: what is averaged, over what, and the command itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.evaluation.likelihood import BINS, LikelihoodSize, measure, plot
from tests.random_models import make_pipeline

SCRIPT = Path(__file__).parents[2] / "inference" / "evaluate.py"
FORMS = ("DDPM", "lecture")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(sample_size=8).save_pretrained(folder)
    return LatentDiffusionPipeline.from_pretrained(folder)


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1


def test_terms_add_up_and_batches_do_not_matter(pipeline: LatentDiffusionPipeline) -> None:
    captions = ["a cat", "dog", "pain"]
    size = LikelihoodSize(levels=4, ode_images=2, ode_steps=2, batch_size=2)
    found = measure(pipeline, images(3), captions, size)
    figures = found.figures
    assert figures["images"] == 3 and figures["ODE images"] == 2
    assert math.isfinite(figures["ODE and reconstruction"])
    for form in FORMS:
        terms = [
            figures[f"{form}: {t}"] for t in ("reconstruction", "prior matching", "consistency")
        ]
        assert figures[f"{form}: sum of the three"] == pytest.approx(sum(terms), rel=1e-4)
    whole = measure(pipeline, images(3), captions, LikelihoodSize(levels=4, ode_images=0))
    assert "ODE and reconstruction" not in whole.figures
    for form in FORMS:
        name = f"{form}: sum of the three"
        assert whole.figures[name] == pytest.approx(figures[name], rel=1e-3)
    assert 1 <= len(found.curve["loss"]) <= BINS
    assert all(len(values) == len(found.curve["loss"]) for values in found.curve.values())
    assert min(found.curve["loss"]) > 0 and found.curve["timestep"] == sorted(
        found.curve["timestep"]
    )


def test_the_caption_matters(pipeline: LatentDiffusionPipeline) -> None:
    size = LikelihoodSize(levels=4, ode_images=0)
    name = "DDPM: consistency"
    one, other = (
        measure(pipeline, images(2), [c, c], size).figures[name] for c in ("a cat", "pain")
    )
    assert one != other


def test_a_network_that_answers_zero_has_the_curve_of_its_target(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model predicts ε, of mean square 1 at every timestep; the answer 0 costs just that."""
    size = LikelihoodSize(levels=32, ode_images=0)
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, t, kv=None: torch.zeros_like(x))
    curve = measure(pipeline, images(8), ["a"] * 8, size).curve
    assert len(curve["loss"]) == BINS
    assert torch.tensor(curve["loss"]).sub(1).abs().max() < 0.25
    assert sum(curve["loss"]) / BINS == pytest.approx(1, abs=0.03)


def test_plot_and_sizes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = {"timestep": [1.0, 500.0], "loss": [0.3, 0.1], "bits": [1e-2, 1e-4]}
    plot(curve, tmp_path / "a.png", "Loss")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(UserError, match="ode_steps must be at least 1; got 0"):
        LikelihoodSize(ode_steps=0)


@pytest.mark.slow
def test_the_command_measures_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--images", "4", "--levels", "4", "--ode-images", "0"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--likelihood", *sizes, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "likelihood.json").read_text())
    assert figures["images"] == 4 and figures["reference"] == "twemoji"
    assert (tmp_path / "likelihood.png").is_file()
    assert set(figures["loss by timestep"]) == {"timestep", "loss", "bits"}


def test_the_earlier_names_of_two_options_are_read() -> None:
    from latentdiff.cli.evaluate import parse

    args = parse(["--likelihood", "--pictures", "3", "--ode-pictures", "1"])
    assert (args.images, args.ode_images) == (3, 1)
