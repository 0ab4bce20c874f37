"""The fine-tuning methods by name: `finetune.kind` in a configuration.

A new one is a file with a frozen dataclass, distinguished by its `kind`, and an
`apply(components, config) -> Trainee`; then a row in METHODS and a word in FinetuneConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from latentdiff.finetune import full, lora, textual_inversion
from latentdiff.finetune.full import FullConfig
from latentdiff.finetune.lora import LoraConfig
from latentdiff.finetune.textual_inversion import TextualInversionConfig
from latentdiff.finetune.trainee import Trainee

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components

FinetuneConfig = FullConfig | LoraConfig | TextualInversionConfig
"""Any method's configuration."""

METHODS: dict[str, Callable[[Components, Any], Trainee]] = {
    "full": full.apply,
    "lora": lora.apply,
    "textual_inversion": textual_inversion.apply,
}


def apply_method(components: Components, config: FinetuneConfig) -> Trainee:
    """Prepare a model's parts, which are changed in place, for training by one method.

    Args:    components: the U-Net already where it will be trained, in float32.
    Raises:  UserError: what the method says of parts it cannot train.
    """
    return METHODS[config.kind](components, config)
