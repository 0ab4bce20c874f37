"""One evaluation from prompts to figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.emoji import Drawing
from latentdiff.evaluation import measures, prompts
from latentdiff.evaluation.features import ClassifierFeatures
from latentdiff.evaluation.galleries import Galleries
from latentdiff.evaluation.measures import Generator, Pictures, Result, Shown
from latentdiff.evaluation.misses import concept_miss, ground_miss, style_miss
from latentdiff.models.perceptual import PerceptualDistance


@dataclass(frozen=True)
class Size:
    """How much is generated."""

    concepts: int = 300
    """Plain pictures of different concepts."""
    compositions: int = 150
    """Held-out (concept, style) pairs, and as many (concept, background) pairs."""
    seeds: int = 4
    """Seeds per prompt of the diversity measure."""
    diverse: int = 12
    """Prompts of the diversity measure."""


class Evaluation:
    """Measures one pipeline on the embedded data's fixed prompts.

    Args:
        pipeline: a LatentDiffusionPipeline.
        generator: see measures.Generator.
        size: how much is generated.
        cache: folder of the real pictures' features.
        say: receives a line before every longer step.
    Raises: UserError: a package of the `eval` or `demo` extra is missing.
    """

    def __init__(
        self,
        pipeline: Any,
        generator: Generator,
        size: Size,
        cache: Path,
        say: Callable[[str], None],
    ) -> None:
        self.pipeline, self.generator, self.size, self.say = pipeline, generator, size, say
        self.side = pipeline.default_size[0]
        self.drawings: list[Drawing] = prompts.gallery_drawings()
        self.features = ClassifierFeatures(pipeline.device)
        self.distance = PerceptualDistance()
        self.galleries = Galleries(self.drawings, self.side, self.features, cache, say)
        self.result = Result()

    def run(self, score: Any = None) -> Result:
        """Measure everything. Args: score: a ClipScorer, or None to leave the CLIP score out."""
        self._concepts(score)
        self._held_out()
        self._diversity()
        figures = self.result.figures
        figures["seconds per picture"] = self.generator.seconds / self.generator.count
        return self.result

    def _keep(
        self,
        name: str,
        asked: Sequence[prompts.Asked],
        images: Pictures,
        real: Pictures,
        wrong: Sequence[str],
    ) -> None:
        self.result.pages[name] = [
            Shown(item.prompt, ours, theirs, words)
            for item, ours, theirs, words in zip(asked, images, real, wrong, strict=True)
        ]

    def _concepts(self, score: Any) -> None:
        asked = prompts.concept_prompts(self.drawings, self.size.concepts)
        texts = [item.prompt for item in asked]
        self.say(f"{len(asked)} concepts")
        images = self.generator(texts)
        real = measures.real_pictures([item.rendering for item in asked], self.side)
        rebuilt = measures.through_vae(real, self.pipeline.autoencoder)
        gallery = self.galleries("plain", "white")
        figures = self.result.figures
        found = self.features(images)
        figures |= measures.concepts(asked, found, self.features(rebuilt), gallery)
        figures |= measures.reconstruction(real, rebuilt, self.distance)
        if score is not None:
            figures["CLIP score"] = measures.clip_score(texts, images, score)
            figures["real: CLIP score"] = measures.clip_score(texts, real, score)
        pairs = zip(asked, found, strict=True)
        wrong = [concept_miss(item, one, gallery, self.drawings) for item, one in pairs]
        self._keep("Concepts", asked, images, real, wrong)

    def _held_out(self) -> None:
        figures, count = self.result.figures, self.size.compositions
        hits = []
        for name, asked in (
            ("Held-out styles", prompts.held_out_styles(self.drawings, count)),
            ("Held-out backgrounds", prompts.held_out_grounds(self.drawings, count)),
        ):
            self.say(f"{len(asked)} {name.lower()}")
            images = self.generator([item.prompt for item in asked], seed=10_000)
            real = measures.real_pictures([item.rendering for item in asked], self.side)
            found = self.features(images)
            if name == "Held-out styles":
                classifier = measures.style_classifier(self.drawings, self.side, self.features)
                known = self.features(real)
                figures |= _named(name, measures.styles(asked, found, known, classifier))
                wrong = [style_miss(*pair, classifier) for pair in zip(asked, found, strict=True)]
            else:
                figures |= _named(name, measures.grounds(asked, images, real))
                wrong = [ground_miss(*pair) for pair in zip(asked, images, strict=True)]
            hits.append(measures.compositions(asked, found, self.galleries))
            figures[f"{name}: concept top-5"] = hits[-1]
            for i, (item, one) in enumerate(zip(asked, found, strict=True)):
                gallery = self.galleries(item.rendering.style, item.rendering.background)
                both = (concept_miss(item, one, gallery, self.drawings), wrong[i])
                wrong[i] = "; ".join(filter(None, both))
            self._keep(name, asked, images, real, wrong)
        figures["Held-out compositions: concept top-5"] = sum(hits) / len(hits)

    def _diversity(self) -> None:
        asked = prompts.concept_prompts(self.drawings, self.size.diverse)
        self.say(f"{len(asked)} prompts with {self.size.seeds} seeds each")
        groups = []
        for item in asked:
            images = self.generator([item.prompt] * self.size.seeds, seed=20_000)
            groups.append(images)
            shown = [Shown(item.prompt, image) for image in images]
            self.result.pages.setdefault("Seeds", []).extend(shown)
        self.result.figures["diversity over seeds, LPIPS"] = measures.diversity(
            groups, self.distance
        )


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}: {name}": value for name, value in figures.items()}


def open_score(folder: Path) -> Any:
    """Open the model's own CLIP.

    Returns: a ClipScorer, or None when the folder has no image tower: then there is no CLIP score.
    """
    from latentdiff.models.clip_scorer import IMAGE_TOWER, load_clip_scorer

    return load_clip_scorer(folder) if (folder / IMAGE_TOWER).is_dir() else None


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures to four significant digits."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }


def device_words(device: torch.device) -> str:
    """Say what computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
