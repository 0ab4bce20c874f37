"""One evaluation from prompts to figures, and what each wrong picture was taken for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.emoji import Drawing, EmojiSource, Rendering
from latentdiff.data.styles import STYLES
from latentdiff.evaluation import metrics as measures
from latentdiff.evaluation import prompts
from latentdiff.evaluation.metrics import (
    SIDE,
    ClassifierFeatures,
    Features,
    Generator,
    Pictures,
    Result,
    Shown,
    classify,
    ground_of,
    ranks,
)
from latentdiff.evaluation.prompts import Asked
from latentdiff.files import atomic_file
from latentdiff.models.autoencoder_losses import PerceptualDistance


class Galleries:
    """Look → (concepts, D) features of the real pictures, kept on disk once computed.

    Args:
        drawings: one per concept, in the gallery's order.
        size: side of the pictures in pixels.
        features: the classifier.
        folder: where results are kept.
        say: called with a line when a gallery has to be computed.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        size: int,
        features: Features,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._drawings, self._size, self._features = drawings, size, features
        self._folder, self._say = folder, say
        self._known: dict[tuple[str, str], Tensor] = {}

    def __call__(self, style: str, background: str) -> Tensor:
        """Return the features of one look."""
        look = (style, background)
        if look not in self._known:
            self._known[look] = self._load_or_make(style, background)
        return self._known[look]

    def _load_or_make(self, style: str, background: str) -> Tensor:
        from safetensors.torch import load_file, save_file

        source = EmojiSource([Rendering(d, style, background) for d in self._drawings], self._size)
        key = hashlib.blake2b(f"{source.fingerprint()} lite0 {SIDE}".encode(), digest_size=12)
        file = self._folder / f"{key.hexdigest()}.safetensors"
        if file.is_file():
            return load_file(file)["features"]
        self._say(f"features of {len(source)} real pictures, {style} on {background}")
        found = self._features([source[i].image for i in range(len(source))])
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as new:
            save_file({"features": found}, new)
        return found


def concept_miss(item: Asked, found: Tensor, gallery: Tensor, drawings: Sequence[Drawing]) -> str:
    """Name the nearest real picture and the place of the right one; empty if that is the first.

    Args: found: the picture's features (D,).  gallery: (M, D), one row per drawing.
    """
    place = ranks(found[None], gallery, [item.row])[0]
    if place == 0:
        return ""
    cosines = F.normalize(gallery.double(), dim=1) @ found.double()
    return f"taken for {drawings[int(cosines.argmax())].concept}, right one at {place + 1}"


def style_miss(item: Asked, found: Tensor, classifier: Tensor) -> str:
    """Name the style that the classifier sees; empty if it is the one that was asked for."""
    seen = list(STYLES)[int(classify(found[None], classifier))]
    return "" if seen == item.rendering.style else f"style: {seen}"


def ground_miss(item: Asked, image: Image.Image) -> str:
    """Name the ground that is there; empty if it is the one that was asked for."""
    seen = ground_of(image)
    return "" if seen == item.rendering.background else f"ground: {seen}"


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
        generator: see `Generator`.
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
