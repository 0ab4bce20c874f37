"""Make the U-Net that train_latent.py goes on from, for a text tower that draws.

    python training/start_unet.py [--config training/configs/start_unet.yaml] [a.b=value]

Its cross-attentions fetch the right patches of what the tower draws, and which of some words the
prompt has, for which the tower gets marks (latentdiff/trainer/reading_start.py and marks.py);
everything else has random weights. It ends with OUTPUT/model, tower included, which draws nothing
yet. Train it with the same `reading.attentions` and a weight above 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.command_line import command_line
from latentdiff.data.source import DataConfig, open_source
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, exit_with
from latentdiff.formats.diffusers_folder import load_components, save_components
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.trainer.drawing import patches
from latentdiff.trainer.drawing_data import Texts, subject_pictures
from latentdiff.trainer.marks import MarksConfig, mark_words, read_marks
from latentdiff.trainer.output import check_output
from latentdiff.trainer.reading import ReadingConfig, check_reading, told_attentions
from latentdiff.trainer.reading_start import start_reading

CONFIG = Path(__file__).parent / "configs" / "start_unet.yaml"


@dataclass(frozen=True)
class StartConfig:
    """Everything that start_unet.py needs."""

    output: str = "runs/start"
    """Folder to write model/ into."""
    model: str = "embedded"
    """Model folder, or `embedded`, whose other parts are taken."""
    text: str | None = None
    """Output folder of teach_drawing.py; null takes the model's tower, which must draw then."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Shape of the U-Net; channels, context width and sample_size follow from the other parts."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """Which attentions read; its weight has no meaning here."""
    marks: MarksConfig = field(default_factory=MarksConfig)
    """Words that stay legible."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned pictures."""
    captions: int = 600
    """How many captions the regressions see for the patches; for the marks it is eight times."""
    seed: int = 0
    """Of the random weights and the choice of captions."""

    def validate(self) -> list[str]:
        """List what is out of range or cannot go together."""
        problems = []
        if self.captions < 1:
            problems.append(f"captions must be at least 1; got {self.captions}.")
        if not self.reading.attentions:
            problems.append("reading.attentions must name at least one; got none.")
        if bool(self.marks.words) != bool(self.marks.attentions):
            problems.append("marks.words and marks.attentions must both be given, or neither.")
        both = sorted({*self.reading.attentions} & {*self.marks.attentions})
        if both:
            problems.append(
                f"an attention reads patches or marks, not both; got {', '.join(both)}."
            )
        return problems


def start(config: StartConfig) -> Path:
    """Make the U-Net and write the model. Returns: its folder."""
    check_output(Path(config.output), False)
    root = Path(EMBEDDED_MODEL if config.model == "embedded" else config.model)
    parts = load_components(root)
    text = parts.text_encoder
    if config.text is not None:
        text = load_text_encoder(Path(config.text, "text_encoder"), Path(config.text, "tokenizer"))
    assert isinstance(text, TextEncoder)
    text.module.float()
    channels = parts.autoencoder.latent_channels
    shape = replace(
        config.unet,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=text.width,
        sample_size=config.data.image_size // parts.autoencoder.downscale,
    )
    torch.manual_seed(config.seed)
    unet = UNet(shape).init_for_training()
    check_reading(unet, replace(config.reading, weight=1.0), text.max_length)
    told_attentions(unet, config.marks.attentions, "marks.attentions")
    source = open_source(config.data)
    pictures, rows = subject_pictures(source, config.data, root, torch.device("cpu"))
    draw = Texts(source, rows, text.tokenizer, config.seed)
    if config.marks.words:
        every = Texts(source, rows, text.tokenizer, config.seed, draws=1)  # long ones too
        for kind, share in zip(config.marks.words, mark(config, unet, text, every), strict=True):
            print(f"{kind}: which a text has is read in {share:.1%} of those with one")
    texts, _, drawn = draw(0, config.captions)
    wanted = patches(pictures[drawn], pictures.shape[-1] // config.reading.grid)
    error = start_reading(unet, config.reading, encode(text, texts), wanted)
    size = sum(p.numel() for p in unet.parameters())
    print(f"{size:,} parameters; mean squared error of what heads fetch at the right place: "
          f"{error:.4f} (variance {float(wanted.var()):.3f})")  # fmt: skip
    folder = Path(config.output) / "model"
    save_components(folder, replace(parts, unet=unet, text_encoder=text), torch.float32)
    return folder


def mark(config: StartConfig, unet: UNet, text: TextEncoder, draw: Texts) -> list[float]:
    """Mark the words in the tower and let the U-Net read them.

    Returns: for each kind of words how often it does.
    """
    texts, ids, _ = draw(1, 8 * config.captions)
    tokens = mark_words(text, config.marks.kinds, ids[:: len(ids) // config.captions])
    return read_marks(unet, config.marks.attentions, encode(text, texts), ids, tokens)


def encode(text: TextEncoder, texts: list[str]) -> torch.Tensor:
    """States of texts, (N, tokens, width)."""
    return torch.cat([text.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]).float()


if __name__ == "__main__":
    try:
        asked, resume = command_line(StartConfig, CONFIG, __doc__)
        if resume:
            raise UserError(
                "--resume: this takes a minute and cannot be gone on with; run it anew."
            )
        print(f"model: {start(asked)}")
    except UserError as error:
        exit_with(error)
