"""The fine-tuning methods by name: `finetune.kind` in a configuration.

A new one is a file with a frozen dataclass, distinguished by its `kind`, and a `Method`; then a row
in METHODS and a word in FinetuneConfig. What the U-Net is given besides latents, time and context
(a masked image, a control image) is its `extra`, which `BatchMaker` puts into `LatentBatch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentdiff.data.masked_images import MaskedImages
from latentdiff.finetune.full import Full, FullConfig
from latentdiff.finetune.inpainting import Inpainting, InpaintingConfig
from latentdiff.finetune.lora import Lora, LoraConfig
from latentdiff.finetune.method import Method
from latentdiff.finetune.textual_inversion import TextualInversion, TextualInversionConfig

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components

FinetuneConfig = FullConfig | LoraConfig | TextualInversionConfig | InpaintingConfig
"""Any method's configuration."""

METHODS: dict[str, Any] = {
    "full": Full,
    "lora": Lora,
    "textual_inversion": TextualInversion,
    "inpainting": Inpainting,
}


def make_method(components: Components, config: FinetuneConfig) -> Method:
    """Prepare a model's parts, which are changed in place, for training by one method.

    Any method trains an inpainting U-Net as such, with masked images.

    Args:    components: the U-Net already where it will be trained, in float32.
    Raises:  UserError: what the method says of parts it cannot train.
    """
    method: Method = METHODS[config.kind](components, config)
    if components.unet.config.inpaints:
        method.extra = MaskedImages(components.autoencoder)
    return method
