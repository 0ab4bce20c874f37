"""Where the model that comes with the package is."""

from __future__ import annotations

from pathlib import Path

#: A Stable Diffusion folder: unet/ vae/ text_encoder/ tokenizer/ scheduler/ model_index.json.
EMBEDDED_MODEL: Path = Path(__file__).parent / "assets" / "embedded"


def named(name: str | Path) -> str | Path:
    """The folder of the model that is called `embedded`; other names as they are."""
    return EMBEDDED_MODEL if name == "embedded" and not Path(name).exists() else name
