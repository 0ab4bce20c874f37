"""The models that requests may name, and those that are in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.embedded import named
from latentdiff.errors import UserError, choice_error, some, warn
from latentdiff.pipelines.hashes import model_hash, model_name
from latentdiff.tensor_file import pickles_refused

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.serve.settings import Settings

#: What the embedded model and an own autoencoder are called.
EMBEDDED, OWN_VAE = "embedded", "Automatic"
_FILE = ".safetensors"


class Models:
    """What may be asked for by name; only what was named at the start.

    Raises:  UserError: two models of one name, a folder without any, or a missing LoRA folder.
    """

    def __init__(self, settings: Settings) -> None:
        from latentdiff.pipelines.prompt_loras import LoraFolder

        self._settings = settings
        found = [one for source in settings.models or (EMBEDDED,) for one in sources_in(source)]
        self._sources = _by_name(found, "model")
        self._vaes = _by_name(settings.vaes, "autoencoder")
        self.lora_dir = None if settings.lora_dir is None else LoraFolder(settings.lora_dir)
        self.loras = [] if self.lora_dir is None else self.lora_dir.names
        self.defaults: dict[str, dict[str, Any]] = {}
        """Of the models that have been loaded so far: what a call takes that does not say."""
        self._loaded: OrderedDict[tuple[str, str | None], LatentDiffusionPipeline] = OrderedDict()
        self._hashes: dict[str, str] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the models; the first is the default."""
        return list(self._sources)

    @property
    def vaes(self) -> list[str]:
        """Of the autoencoders besides the models' own."""
        return list(self._vaes)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory."""
        with self._lock:
            return list(dict.fromkeys(name for name, _ in self._loaded))

    def check(self, model: str | None, vae: str | None) -> None:
        """Raises: UserError: a name that there is not."""
        if model is not None and model not in self._sources:
            raise choice_error("model", model, self._sources)
        if vae not in (None, OWN_VAE) and vae not in self._vaes:
            raise choice_error("vae", vae, (OWN_VAE, *self._vaes))

    def size(self, name: str | None) -> dict[str, int]:
        """Width and height of a model's training, and of what they are a `multiple`, in pixels;
        Stable Diffusion's where its files do not say it or are not here yet."""
        name = name or self.names[0]
        if name in self.defaults:
            return self.defaults[name]
        if name not in self._sizes:
            self._sizes[name] = _size_in(Path(named(self._sources[name])))
        return self._sizes[name]

    def hash(self, name: str) -> str | None:
        """Of the model of that name, see `model_hash`; None: its files are not known yet."""
        source = Path(named(self._sources[name]))
        if name not in self._hashes and source.exists():
            self._hashes[name] = model_hash(source)
        return self._hashes.get(name)

    @contextmanager
    def use(self, model: str | None, vae: str | None) -> Iterator[LatentDiffusionPipeline]:
        """A pipeline, loaded if it is not in memory; the least recently used leaves for it.

        Raises:  UserError: an unknown name, or what cannot be loaded.
        """
        self.check(model, vae)
        key = self.names[0] if model is None else model, None if vae == OWN_VAE else vae
        pipeline = self._loaded.get(key)
        if pipeline is None:
            with self._lock:
                while len(self._loaded) >= self._settings.max_models:
                    self._loaded.popitem(last=False)
            with pickles_refused():
                pipeline = self._load(*key)
        with self._lock:
            self._loaded[key] = pipeline
            self._loaded.move_to_end(key)
        yield pipeline

    def unload(self) -> None:
        """Free the memory; what is being used leaves when it is done."""
        with self._lock:
            self._loaded.clear()

    def _load(self, name: str, vae: str | None) -> LatentDiffusionPipeline:
        import torch

        from latentdiff.formats.embedding import embedding_and_token
        from latentdiff.pipelines.generate import LatentDiffusionPipeline
        from latentdiff.pipelines.inputs import device_of
        from latentdiff.pipelines.lora import lora_and_weight

        settings, source = self._settings, self._sources[name]
        pipeline = LatentDiffusionPipeline.from_pretrained(
            None if source == EMBEDDED else source,
            dtype=getattr(torch, settings.dtype),
            vae=None if vae is None else self._vaes[vae],
        ).to(device_of(settings.device))
        for text in settings.loras:
            file, weight = lora_and_weight(text)
            with _only_for_some(file, len(self._sources)):
                pipeline.load_lora(file, weight)
        for text in settings.embeddings:
            file, token = embedding_and_token(text)
            with _only_for_some(file, len(self._sources)):
                pipeline.load_embedding(file, token)
        self.defaults[name] = _defaults(pipeline)
        return pipeline


def _size_in(source: Path) -> dict[str, int]:
    """What `Models.size` says of a model that has not been loaded."""
    from latentdiff.formats.model import autoencoder_config, latent_size

    latents, levels = None, 0
    with suppress(UserError):  # which is said when it is loaded
        if source.exists():
            latents = latent_size(source)
            levels = len((autoencoder_config(source) or {}).get("block_out_channels", ()))
    if not levels:
        return {"width": 512, "height": 512, "multiple": 1}
    latents = latents or 64
    height, width = (latents, latents) if isinstance(latents, int) else latents
    down = 2 ** (levels - 1)
    return {"width": width * down, "height": height * down, "multiple": down}


def _defaults(pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """Values by the names of arguments; sides are multiples of `multiple`, in pixels."""
    height, width = pipeline.default_size
    return {
        "height": height,
        "width": width,
        "multiple": pipeline.autoencoder.downscale,
        "guidance_scale": pipeline.default_guidance,
        "sampler": pipeline.components.sampling.sampler,
    }


@contextmanager
def _only_for_some(file: str, models: int) -> Iterator[None]:
    """Let a file that does not fit one of several models be a warning."""
    try:
        yield
    except UserError as error:
        if models == 1:
            raise
        warn(f"{Path(file).name} is left out: {error}")


def sources_in(source: str) -> list[str]:
    """A model, or the models in a folder of models, by name. Raises: UserError: there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return [source]
    inside = sorted(
        one
        for one in folder.iterdir()
        if one.suffix == _FILE or (one / "model_index.json").exists()
    )
    if not inside:
        raise UserError(
            f"{source} is neither a model (it has no model_index.json) nor a folder of models: "
            f"there is no {_FILE} file and no model folder in it."
        )
    return [str(one) for one in inside]


def _by_name(sources: Sequence[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        name = model_name(source)
        if found.setdefault(name, source) != source:
            raise UserError(f"two {what}s are called {name}: {some([found[name], source])}.")
    return found
