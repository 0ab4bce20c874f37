"""The encoded images of a train_latent.py run, and what is to be said about them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.data.source import Source, open_source, report_skipped, split
from latentdiff.files import default_cache
from latentdiff.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Latents:
    """The encoded images and which of them are held out."""

    data: Any
    """A LatentCache, OnlineLatents or StreamLatents."""
    train: list[int]
    """Indices to train on."""
    held_out: list[int]
    """Indices never trained on; may be empty."""

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        digest = hashlib.blake2b(digest_size=12)
        for index in self.train:
            digest.update("\x1f".join((*self.data.captions(index), "\x1e")).encode())
        return {
            "images": self.data.fingerprint(),
            "training images": len(self.train),
            "captions": digest.hexdigest(),
        }


def open_latents(config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Latents:
    """Open the data; encode what is not in the cache yet, on one process of each machine.

    Raises: UserError: no data, no captions, no usable image.
    """
    device = accelerator.device
    if config.data.streaming:
        from latentdiff.data.online import StreamLatents

        rank, ranks, seed = accelerator.process_index, accelerator.num_processes, config.loop.seed
        stream = StreamLatents(config.data, autoencoder, device, rank, ranks, seed)
        return Latents(stream, [], [])  # nothing is held out of what is not known beforehand
    source = open_source(config.data)
    if config.latents.online:
        from latentdiff.data.online import OnlineLatents

        data: Any = OnlineLatents(source, autoencoder, config.data, device)
    else:
        data = _cached(source, config, autoencoder, accelerator)
    return Latents(data, *split(data, config.data.validation_share, config.data.split_seed))


def _cached(source: Source, config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Any:
    from latentdiff.data.latents import build_latent_cache

    with accelerator.local_main_process_first():
        data = build_latent_cache(
            source,
            autoencoder,
            config.data,
            Path(config.latents.cache_dir or default_cache()),
            batch_size=config.latents.batch_size,
            device=accelerator.device,
            progress=accelerator.is_local_main_process,
        )
    for text in (report_skipped(data.skipped), bucket_table(data)):
        if text and accelerator.is_main_process:
            print(text, flush=True)
    return data


def none_held_out(latents: Latents, config: TrainConfig) -> list[str]:
    """Say that no loss on unseen images will be measured, where that was not asked for."""
    share = config.data.validation_share
    if latents.held_out or not share:  # a share of 0 is a decision, not a surprise
        return []
    if config.data.streaming:
        return [
            "note: no image is held out, so no validation loss is measured: a stream's images "
            "are not known beforehand. Set data.streaming=false to hold some out."
        ]
    more = max(0.2, min(2 * share, 0.5))
    raising = (
        f"Raise it (for example data.validation_share={more:g}), try" if more > share else "Try"
    )
    return [
        f"note: no image is held out, so no validation loss is measured: of {len(latents.train)} "
        f"images data.validation_share={share:g} chose none. {raising} another data.split_seed, "
        "or set it to 0 to train on all without this note."
    ]


def bucket_table(data: Any) -> str:
    """Say how many images each aspect-ratio bucket has, or "" where there is one."""
    shapes = getattr(data, "shapes", ())
    if len(shapes) < 2:
        return ""
    numbers = data.buckets.tolist()
    lines = [f"  {h}x{w} latents: {numbers.count(i)}" for i, (_, h, w) in enumerate(shapes)]
    return "\n".join(["images per bucket (height x width):", *lines])


def long_captions(latents: Latents, text_encoder: Any, looked_at: int = 500) -> list[str]:
    """Say how many captions are too long for the text encoder, judged by some of them."""
    # The encoder warns for each such prompt; of a training set once is enough.
    warnings.filterwarnings("ignore", message="the text encoder takes")
    rows = latents.train[:: max(1, len(latents.train) // looked_at)]
    limit = text_encoder.max_length
    long = [row for row in rows if text_encoder.count_tokens(latents.data.captions(row)[0]) > limit]
    if not long:
        return []
    example = latents.data.captions(long[0])[0]
    return [
        f"note: about {len(long) / len(rows):.0%} of the captions are longer than the {limit} "
        f"tokens that the text encoder takes and are cut off there, for example {example[:200]!r}"
    ]
