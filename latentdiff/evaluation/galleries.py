"""Features of the real pictures of every concept in one look, kept on disk once computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.data.emoji import Drawing, EmojiSource, Rendering
from latentdiff.evaluation.features import SIDE, Features


class Galleries:
    """Look → (concepts, D) features of the real pictures.

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
