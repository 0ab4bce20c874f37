"""How a server is set up; plain values, so that replicas in other processes get them too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What `latentdiff serve` was told; defaults are those of its options."""

    models: tuple[str, ...] = ()
    """Folders, files or Hugging Face ids, the first of which is the default; a folder of models
    stands for all in it; none: the embedded model."""
    vaes: tuple[str, ...] = ()
    """Other autoencoders that requests may name."""
    loras: tuple[str, ...] = ()
    """FILE[:WEIGHT] of LoRA files that every image has."""
    lora_dir: str | None = None
    """Where `<lora:name:0.7>` in prompts finds its files."""
    embeddings: tuple[str, ...] = ()
    """FILE[=TOKEN] of learned words."""
    device: str | None = None
    dtype: str = "float32"
    host: str = "127.0.0.1"
    port: int = 7860
    api_key: str | None = field(default=None, repr=False)
    """Who has it may ask: as a bearer token, or as the password of Basic authentication. None:
    everyone who reaches the server."""
    root_path: str = ""
    """Under which path a reverse proxy shows the server, such as /paint."""
    allow_origins: tuple[str, ...] = ()
    """Other sites whose pages may ask, such as https://example.org."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses whose X-Forwarded-… headers are believed."""
    output: Path | None = None
    """Where all images are kept as files too."""
    links: Path | None = None
    """Where several replicas keep for an hour what links lead to; None: in a temporary folder."""
    batch_size: int = 8
    """Images per pass."""
    max_waiting: int = 256
    """Images that may wait; more are refused with 429."""
    max_models: int = 2
    """Models in memory; the least recently used leaves."""
    idle_minutes: float = 0.0
    """After so long without a request models leave the memory; 0: never."""
    max_body: int = 32 * 2**20
    """Bytes of a request."""
    max_pixels: int = 2048 * 2048
    """Of an image that is given or asked for; of what the model sees at once there is a limit by
    the model too, see `requests.ENLARGED`."""
    max_steps: int = 150
    """Of an image; also those of a request that does not say how many, if the usual are more."""
