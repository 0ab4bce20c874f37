"""LoRA and DoRA: two thin matrices beside each chosen layer are trained, its weight is not.

    y = W x + (α/r) B A x          B starts at zero, so training starts at the pretrained model

What the matrices are and how they are added up is in `models.low_rank`; here peft puts them into
the network, and they are taken out again. While they are in, a changed layer's own weight is called
`base_layer.weight`; files and exported models have the usual names.

The averages of the weights are those of A and of B, each for itself.

Source:  Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from latentdiff.config import FREE
from latentdiff.errors import UserError
from latentdiff.finetune.method import Method, TextConditioned
from latentdiff.formats.lora import FILE, write_lora
from latentdiff.models.clip_text import ClipText, TextEncoder
from latentdiff.models.low_rank import LowRank, layers_of
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components

#: Where a run's files are, in its folder.
FOLDER, KOHYA_FILE, FUSED = "lora", "lora_kohya.safetensors", "model"
#: Which layers of the U-Net a word means, by how their names end.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "projection": ("proj_in", "proj_out"),
    "resnet": ("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}
#: diffusers reads text-encoder adapters in kohya's layout only when all four are there.
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_ADAPTER = "default"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank matrices beside some layers; needs peft (`pip install 'latentdiff[lora]'`)."""

    kind: Literal["lora"] = "lora"
    """lora: low-rank matrices beside the weights of a pretrained model; the run ends with
    OUTPUT/lora, files that this package, diffusers and kohya's tools read."""
    rank: int = 8
    """r, the inner width of the two matrices."""
    alpha: float | None = None
    """α; the change is scaled by α/r. null: the rank."""
    dora: bool = False
    """Train each weight's magnitude apart from its direction (DoRA)."""
    targets: tuple[Literal["attention", "feed_forward", "projection", "resnet"], ...] = (
        "attention",
    )
    """Which layers of the U-Net: attention (q, k, v, out), feed_forward, projection (into and out
    of the transformers), resnet (convolutions and time projections)."""
    text_encoder: bool = False
    """Adapt the text encoder's attention too."""
    fuse: bool = field(default=False, metadata=FREE)
    """Also write OUTPUT/model, the whole model with the changes added to its weights."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = [] if self.rank >= 1 else [f"rank must be at least 1; got {self.rank}."]
        if self.alpha is not None and self.alpha <= 0:
            problems.append(f"alpha must be above 0, or null; got {self.alpha}.")
        if not self.targets and not self.text_encoder:
            problems.append("targets must name something to train when text_encoder is false.")
        return problems


class Lora(Method):
    """A frozen model with adapters beside the chosen layers.

    Raises: UserError: the network has none of the layers asked for.
    """

    adds = True
    usage = f"--lora {{output}}/{FOLDER}/{FILE}"

    def __init__(self, components: Components, config: LoraConfig) -> None:
        super().__init__(components)
        self.config = config
        unet, text_encoder = components.unet, components.text_encoder
        unet.requires_grad_(False)
        if ends := tuple(end for target in config.targets for end in TARGETS[target]):
            insert(unet, ends, config)
        if config.text_encoder:
            used = int(text_encoder.module.config["num_hidden_layers"]) - text_encoder.clip_skip
            layers = [f"layers.{k}.self_attn.{end}" for k in range(used) for end in TEXT_TARGETS]
            insert(text_encoder.module, tuple(layers), config)
            self.module = TextConditioned(unet, text_encoder)
            self.encode = text_encoder.tokenizer

    def export(self, components: Components, output: Path, dtype: torch.dtype) -> list[Path]:
        """Write OUTPUT/lora in both layouts, and the fused model where that was asked for."""
        config, text = self.config, components.text_encoder
        found = {f"unet.{n}": c for n, c in changes(components.unet, config).items()}
        found |= {f"text_encoder.{n}": c for n, c in changes(text.module, config).items()}
        # A1111's number, as in the files of kohya's trainer.
        about = {"ss_clip_skip": str(text.clip_skip + 1)} if text.clip_skip else None
        folder = output / FOLDER
        written = [
            write_lora(folder / FILE, found, "diffusers", dtype, about),
            write_lora(folder / KOHYA_FILE, found, "kohya", dtype, about),
        ]
        if config.fuse:
            written.append(_export_fused(components, config, output / FUSED, dtype))
        return written


def insert(network: nn.Module, ends: tuple[str, ...], config: LoraConfig) -> None:
    """Let peft put an adapter beside every layer whose name ends so.

    Raises: UserError: there is none.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    whole_words = tuple(f".{end}" for end in ends)
    chosen = [name for name in layers_of(network) if f".{name}".endswith(whole_words)]
    if not chosen:
        raise UserError(
            f"finetune.targets={', '.join(config.targets)} matches no layer of this U-Net; choose "
            f"among {', '.join(TARGETS)}."
        )
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=_alpha(config),  # type: ignore[arg-type]
        target_modules=chosen,
        use_dora=config.dora,
        lora_dropout=0.0,
    )
    inject_adapter_in_model(settings, network, _ADAPTER)


def changes(network: nn.Module, config: LoraConfig) -> dict[str, LowRank]:
    """The adapters in a network by layer name."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            adapter: Any = layer
            down, up = adapter.lora_A[_ADAPTER].weight, adapter.lora_B[_ADAPTER].weight
            magnitude = None
            if _ADAPTER in adapter.lora_magnitude_vector:
                magnitude = adapter.lora_magnitude_vector[_ADAPTER].weight.detach().flatten()
            found[name] = LowRank(down.detach(), up.detach(), _alpha(config), magnitude)
    return found


def fused(network: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The state dict of the network without adapters, their changes added."""
    added = changes(network, config)
    state = {}
    for name, tensor in network.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        layer, _, kind = plain.rpartition(".")
        if layer in added and kind == "weight":
            tensor = tensor + added[layer].delta(tensor)
        state[plain] = tensor
    return state


def _alpha(config: LoraConfig) -> float:
    return float(config.rank if config.alpha is None else config.alpha)


def _export_fused(
    components: Components, config: LoraConfig, folder: Path, dtype: torch.dtype
) -> Path:
    from latentdiff.formats.folder import save_components

    text = components.text_encoder
    with torch.device("meta"):
        unet, tower = UNet(components.unet.config), ClipText(text.module.config)
    unet.load_state_dict(fused(components.unet, config), assign=True)
    tower.load_state_dict(fused(text.module, config), assign=True)
    whole = dataclasses.replace(
        components, unet=unet, text_encoder=TextEncoder(tower, text.tokenizer)
    )
    return save_components(folder, whole, dtype)
