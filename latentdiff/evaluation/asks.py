"""Prompts that say what their images must show, and the share of images that show it.

A file has one JSON object a line: a prompt, and any of the fields of `Ask`. What is stated is
measured, by group; a line's real image, if it names one, is measured the same way after a pass
through the model's autoencoder, and gives the ceiling.

Concepts and styles are those of the reference: its images' first captions are names of concepts,
their second ones of styles. What is recognised is the cut-out on white, see `objects`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from latentdiff.config import AtLeastOne, build
from latentdiff.data.images import fit, open_image
from latentdiff.errors import UserError
from latentdiff.evaluation import metrics
from latentdiff.evaluation.metrics import (
    ClassifierFeatures,
    Generator,
    Images,
    LinearClassifier,
    Result,
    Shown,
)
from latentdiff.evaluation.objects import (
    APART,
    HUES,
    colour_word,
    cut_out,
    ground_colour,
    halves,
    objects,
)
from latentdiff.evaluation.reference import Reference
from latentdiff.models.autoencoder_losses import PerceptualDistance

#: Concepts among which the right one has to be.
TOP = 5
#: LPIPS below which an image is a near copy. A drawing that was moved and scaled only has 0.01, one
#: artist's beside another's 0.4 (medians of 80 emoji).
COPY = 0.1
#: Folds of the style classifier's own accuracy.
FOLDS = 5


@dataclass(frozen=True)
class Ask:
    """A prompt and what its images must show."""

    prompt: str
    """The text."""
    group: str = "prompts"
    """Whose figures it counts for."""
    seeds: AtLeastOne[int] = 1
    """How many images; of several, their diversity is measured."""
    concept: str | None = None
    """A concept of the reference."""
    left: str | None = None
    """A concept that the left half shows."""
    right: str | None = None
    """The same of the right half."""
    style: str | None = None
    """A style of the reference."""
    colour: str | None = None
    """The objects' hue, a word in HUES."""
    ground: tuple[int, int, int] | None = None
    """Colour of the outer ring, 0 … 255."""
    count: int | None = None
    """How many objects."""
    image: str | None = None
    """A real image of that, beside the file."""

    def validate(self) -> list[str]:
        """List what cannot be measured."""
        if self.colour is None or self.colour in HUES:
            return []
        return [f"colour must be one of {', '.join(HUES)}; got {self.colour!r}."]


def read_asks(file: Path, reference: Reference) -> list[Ask]:
    """Read a file of asks.

    Raises: UserError: it cannot be read, a line is damaged, or names what the reference has not.
    """
    asks = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--asks: {file} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        try:
            ask = build(Ask, json.loads(line))
        except (ValueError, UserError) as error:
            raise UserError(f"{file}, line {number}: {error}") from error
        known = {*reference.prompts}
        concepts = {one for one in (ask.concept, ask.left, ask.right) if one is not None}
        missing = [*concepts - known, *({ask.style} - {None, *reference.styles})]
        if missing:
            raise UserError(
                f"{file}, line {number}: the reference shows no {missing[0]!r}. Concepts are its "
                "images' first captions, styles their second ones."
            )
        asks.append(ask)
    if not asks:
        raise UserError(f"--asks: {file} has no lines.")
    return asks


class Judge:
    """What images show, beside a reference's as the autoencoder shows them."""

    def __init__(
        self, reference: Reference, features: ClassifierFeatures, autoencoder: Any
    ) -> None:
        self.reference, self.features = reference, features
        images = metrics.through_vae(reference.images, autoencoder)
        self.cut = [cut_out(image) for image in images]
        self.gallery = features(self.cut)
        self.style_names = sorted({*reference.styles})
        self._labels = torch.tensor([self.style_names.index(style) for style in reference.styles])

    def places(self, images: Images, concepts: Sequence[str]) -> list[int]:
        """How many concepts each image is nearer to than to its own; 0 is right."""
        if not images:
            return []
        own = [self.reference.prompts.index(concept) for concept in concepts]
        found = self.features([cut_out(image) for image in images])
        return metrics.ranks(found, self.gallery, self.reference.labels, own)

    def styles(self, images: Images) -> list[str]:
        """The style of each image, by a linear classifier of the reference's textures."""
        if not images:
            return []
        found = self._classifier(self.features.textures([cut_out(image) for image in images]))
        return [self.style_names[k] for k in found.tolist()]

    def is_copy(self, cut: Image.Image, distance: PerceptualDistance) -> bool:
        """Whether a cut-out, or its mirror image, is nearly the reference image nearest to it."""
        scores = F.cosine_similarity(self.features([cut]), self.gallery)
        twins = metrics.as_tensors([cut, ImageOps.mirror(cut)])
        nearest = metrics.as_tensors([self.cut[int(scores.argmax())]] * 2)
        with torch.no_grad():
            return float(distance(twins, nearest).min()) < COPY

    def style_accuracy(self) -> float:
        """Of such a classifier on real images of concepts that it was not fitted to."""
        right = []
        for fold in range(FOLDS):
            held = self.reference.labels % FOLDS == fold
            fitted = LinearClassifier(self._textures[~held], self._labels[~held])
            right.append(fitted(self._textures[held]) == self._labels[held])
        return float(torch.cat(right).float().mean())

    @cached_property
    def _textures(self) -> Tensor:
        return self.features.textures(self.cut)

    @cached_property
    def _classifier(self) -> LinearClassifier:
        return LinearClassifier(self._textures, self._labels)

    def verdicts(self, asks: Sequence[Ask], images: Images) -> list[dict[str, bool]]:
        """For each image what is as its ask says, by the names of the figures."""
        found = [_plain_facts(ask, image) for ask, image in zip(asks, images, strict=True)]
        rows = [k for k, ask in enumerate(asks) if ask.concept is not None]
        places = self.places([images[k] for k in rows], [str(asks[k].concept) for k in rows])
        for k, place in zip(rows, places, strict=True):
            found[k] |= {f"concept top-{top}": place < top for top in (1, TOP)}
        rows = [k for k, ask in enumerate(asks) if ask.left is not None and ask.right is not None]
        sides = [halves(images[k]) for k in rows]
        left = self.places([left for left, _ in sides], [str(asks[k].left) for k in rows])
        right = self.places([right for _, right in sides], [str(asks[k].right) for k in rows])
        for k, *both in zip(rows, left, right, strict=True):
            found[k][f"both halves, top-{TOP}"] = max(both) < TOP
        rows = [k for k, ask in enumerate(asks) if ask.style is not None]
        for k, style in zip(rows, self.styles([images[k] for k in rows]), strict=True):
            found[k]["style"] = style == asks[k].style
        return found


def _plain_facts(ask: Ask, image: Image.Image) -> dict[str, bool]:
    facts = {}
    if ask.colour is not None:
        facts["colour"] = colour_word(image) == ask.colour
    if ask.ground is not None:
        distance = (ground_colour(image) - torch.tensor(ask.ground)).norm()
        facts["ground"] = float(distance) <= APART
    if ask.count is not None:
        facts["count"] = len(objects(image)) == ask.count
    return facts


#: Seed of the first image.
SEED = 40_000


def measure_asks(
    asks: Sequence[Ask],
    folder: Path,
    reference: Reference,
    generator: Generator,
    say: Callable[[str], None],
) -> Result:
    """Generate what is asked for and judge it, group by group, with the ceilings.

    Args:   folder: what the asks' real images are relative to.  generator: see `Generator`.
            say: receives a line before every longer step.
    Raises: UserError: a package of the `eval` extra is missing.
    """
    pipeline, distance = generator.pipeline, PerceptualDistance()
    say(f"{len(reference.images)} reference images through the autoencoder")
    judge = Judge(reference, ClassifierFeatures(pipeline.device), pipeline.autoencoder)
    result, seed = Result(), SEED
    for group in dict.fromkeys(ask.group for ask in asks):
        own = [ask for ask in asks if ask.group == group for _ in range(ask.seeds)]
        say(f"{group}: {len(own)} images")
        images = generator([ask.prompt for ask in own], seed)
        seed += len(own)
        verdicts = judge.verdicts(own, images)
        result.figures |= {f"{group}: images": len(own)} | _shares(f"{group}: ", verdicts)
        with_real = [ask for ask in own if ask.image is not None]
        size = reference.images[0].width
        real = [fit(open_image(folder / str(ask.image)), size) for ask in with_real]
        rebuilt = metrics.through_vae(real, pipeline.autoencoder)
        found = judge.verdicts(with_real, rebuilt)
        result.figures |= _shares(f"real through VAE: {group}: ", found)
        result.figures |= _over_seeds(group, own, images, judge, distance)
        beside = dict(zip(map(id, with_real), real, strict=True))
        result.pages[group.capitalize()] = [
            Shown(ask.prompt, image, beside.get(id(ask)), _misses(verdict))
            for ask, image, verdict in zip(own, images, verdicts, strict=True)
        ]
    if order := metrics.own_left_out(judge.gallery, reference.labels):
        name = "real through VAE, own left out: concept top"
        result.figures |= {f"{name}-{n}": metrics.share_within(order, n) for n in (1, TOP)}
    if any(ask.style for ask in asks):
        result.figures["real through VAE: style, unseen concepts"] = judge.style_accuracy()
    result.figures["seconds per image"] = generator.seconds / generator.count
    return result


def _shares(name: str, verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    kinds = dict.fromkeys(kind for verdict in verdicts for kind in verdict)
    stated = {kind: [v[kind] for v in verdicts if kind in v] for kind in kinds}
    return {name + kind: sum(values) / len(values) for kind, values in stated.items()}


def _misses(verdict: dict[str, bool]) -> str:
    return ", ".join(f"not {kind}" for kind, right in verdict.items() if not right)


def _over_seeds(
    group: str,
    own: Sequence[Ask],
    images: Images,
    judge: Judge,
    distance: PerceptualDistance,
) -> dict[str, Any]:
    """How much the seed decides, and how much the reference's images of a concept differ."""
    rows: dict[int, list[int]] = {}
    for k, ask in enumerate(own):
        if ask.seeds > 1:
            rows.setdefault(id(ask), []).append(k)
    if not rows:
        return {}
    groups = [[images[k] for k in of_one] for of_one in rows.values()]
    cut = [[cut_out(image) for image in of_one] for of_one in groups]
    copies = [judge.is_copy(image, distance) for of_one in cut for image in of_one]
    figures: dict[str, Any] = {
        f"{group}: LPIPS between seeds": metrics.diversity(cut, distance),
        f"{group}: near copies of a reference image": sum(copies) / len(copies),
    }
    if any(judge.reference.styles):
        styles = [len({*judge.styles(of_one)}) for of_one in groups]
        figures[f"{group}: styles among the seeds"] = sum(styles) / len(styles)
    concepts = {own[of_one[0]].concept for of_one in rows.values()} - {None}
    labels = [judge.reference.prompts.index(str(concept)) for concept in sorted(map(str, concepts))]
    real = [[judge.cut[k] for k in (judge.reference.labels == n).nonzero()[:, 0]] for n in labels]
    several = [of_one for of_one in real if len(of_one) > 1]
    if several:
        name = f"real through VAE: {group}: LPIPS between images of a concept"
        figures[name] = metrics.diversity(several, distance)
    return figures
