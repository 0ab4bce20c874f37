"""`from latentdiff import pipeline`: the model that comes with the package, loaded when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.task import PipelineOutput


class EmbeddedPipeline:
    """Stands for `LatentDiffusionPipeline.from_pretrained()` without loading it yet."""

    _loaded: LatentDiffusionPipeline | None = None

    def __call__(self, *args: Any, **options: Any) -> PipelineOutput:
        """Generate; takes what `LatentDiffusionPipeline.__call__` takes."""
        return self._load()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # introspection must not load a model
        return getattr(self._load(), name)

    def __repr__(self) -> str:
        state = "not loaded yet" if self._loaded is None else "loaded"
        return f"<latentdiff's embedded pipeline, {state}>"

    def _load(self) -> LatentDiffusionPipeline:
        if self._loaded is None:
            from latentdiff.pipelines.generate import LatentDiffusionPipeline

            self._loaded = LatentDiffusionPipeline.from_pretrained()
        return self._loaded


pipeline = EmbeddedPipeline()
