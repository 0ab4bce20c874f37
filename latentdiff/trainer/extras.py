"""Optional packages are looked for before a run writes anything."""

from __future__ import annotations

import importlib.util

from latentdiff.errors import UserError


def check_extras(
    optimizer_kind: str, wandb_project: str | None, finetune_kind: str = "full"
) -> None:
    """Raises: UserError: a setting needs a package that is not installed."""
    needed = []
    if optimizer_kind == "adamw8bit":
        needed.append(("bitsandbytes", "8bit", "optimizer.kind=adamw8bit", "optimizer.kind=adamw"))
    if wandb_project is not None:
        needed.append(("wandb", "wandb", f"loop.wandb={wandb_project}", "loop.wandb=null"))
    if finetune_kind == "lora":
        needed.append(("peft", "lora", "finetune.kind=lora", "finetune.kind=full"))
    for package, extra, given, instead in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{given} needs {package}, which is not installed. Install it with "
                f"`pip install 'latentdiff[{extra}]'`, or set {instead}."
            )
