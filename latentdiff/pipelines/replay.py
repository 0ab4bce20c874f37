"""An image made again from what its file says, and how like it the new one is.

The bits of an image depend on the size of the batch, its place in it, the number of threads and
the processor. So an image that was the third of four, and is another alone, is made again as the
third of four copies; what stands beside it does not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentdiff.errors import UserError, warn
from latentdiff.images import grid
from latentdiff.pipelines.metadata import OURS, Record, pixels_hash, read
from latentdiff.pipelines.settings import IMAGE_ARGUMENTS
from latentdiff.pipelines.task import TASKS, PipelineOutput, SamplingOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.pipelines.generate import LatentDiffusionPipeline

#: Settings that are options of a call by the same name.
_OPTIONS = (
    *("prompt_syntax", "num_inference_steps", "sampler", "sampler_options", "timestep_spacing"),
    *("timesteps", "guidance_rescale", "guidance_interval", "clip_skip", "batch_size"),
)
#: Options that each image has of its own.
_EACH = ("prompt", "negative_prompt", "guidance_scale", "seed")
#: What settings may name that is not in the file, and why the image can then not be made again.
_GONE = {
    "latents": "its noise was given, not drawn",
    "interrupted": "it was interrupted before its last step",
}
_LOSSLESS = ("PNG", "TIFF", "BMP", "PPM")


@dataclass(frozen=True)
class Replay:
    """What makes the image of a file again, or the images of a grid."""

    file: Path
    record: Record

    @classmethod
    def of(cls, file: Path) -> Replay:
        """Read a file.

        Raises:  UserError: it does not say how it was made, or that cannot be done here.
        """
        record = read(file)
        why_not = record.why_not
        if not why_not and record.settings["task"] not in TASKS:
            why_not = f"it was made by {record.settings['task']}"
        batch, of = (record.settings.get(name, {}) for name in ("batch", "arguments"))
        missing = batch.get("place", 0) >= batch.get("size", 1)
        if not why_not and (missing or of.get("frame", 0) >= of.get("frames", 1)):
            why_not = "its settings are damaged (it is no image of its batch)"
        adapters = [one.get("loras") for one in record.settings.get("images", ())]
        if not why_not and any(one is not None for one in adapters):  # other than the first one's
            why_not = "its images had different LoRA files; --separate files can be made again"
        for name, reason in _GONE.items():
            why_not = why_not or (reason if name in record.settings else "")
        if why_not:
            by = f" (made by {record.program})" if record.program else ""
            raise UserError(f"{file}{by} cannot be made again: {why_not}.")
        if record.edited:
            warn(
                f"the text beside the pixels of {file} was edited ({', '.join(record.edited)}); "
                "the settings are taken that the image was made with."
            )
        return cls(file, record)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the image, or of the first in a grid."""
        return self.record.settings

    def run(
        self, pipeline: LatentDiffusionPipeline, given: Mapping[str, Any], **watching: Any
    ) -> PipelineOutput:
        """Make the images: one alone, and only if that is not the same in its place in its batch.

        Args:    given: options and arguments of the task that replace what is recorded.
                 watching: options that change no image, such as progress.
        Returns: one image, or those of the grid; of replaced options any number.
        Raises:  UserError: an image that it was made from is not there; what the task raises.
        """
        settings = self.settings
        single = "images" not in settings and settings["task"] != "interpolate"
        if not given and single and settings.get("batch", {}).get("size", 1) > 1:
            alone = self._run(pipeline, given, watching, exact=False)
            if pixels_hash(alone.images[0]) == settings.get("pixels"):
                return alone
        return self._run(pipeline, given, watching, exact=not given)

    def _run(
        self,
        pipeline: LatentDiffusionPipeline,
        given: Mapping[str, Any],
        watching: Mapping[str, Any],
        *,
        exact: bool,
    ) -> PipelineOutput:
        task = self.settings["task"]
        method = getattr(pipeline, task)
        images, pick = self._images(exact=exact)
        arguments = self._arguments(images, given)
        frame = arguments.pop("frame", None)
        if frame is not None and "images" not in self.settings and "frames" not in given:
            pick = frame
        signature = inspect.signature(method)
        own = {*signature.parameters, *_EACH}
        if unknown := {*arguments} - own | {*given} - own - {*SamplingOptions.__annotations__}:
            raise UserError(
                f"{self.file} was made by {task}, which takes no {' or '.join(sorted(unknown))}."
            )
        each = {} if task == "interpolate" else _of_each(images, given)
        call = {**self._options(given), **each, **watching, **arguments, **given}
        try:
            signature.bind(**call)
        except TypeError as error:
            raise UserError(f"the settings in {self.file} are damaged: {error}.") from error
        output: PipelineOutput = method(**call)
        return output if pick is None else output.only(pick)

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The recorded options, without those that given ones make void."""
        call = {name: v for name in _OPTIONS if (v := self.settings.get(name)) is not None}
        spread = {"num_inference_steps", "timestep_spacing"}
        listed = "timesteps" in given or ("timesteps" in call and not spread & given.keys())
        void = spread if listed else {"timesteps"}
        if "sampler" in given:
            void = void | {"sampler_options"}
        return {name: value for name, value in call.items() if name not in void}

    def _images(self, *, exact: bool) -> tuple[list[dict[str, Any]], int | None]:
        """The settings of the images of the call, and which of them is kept; None: all."""
        one = self.settings
        if "images" in one:
            return [{**one, **part} for part in one["images"]], None
        batch = one.get("batch", {})
        size, place = batch.get("size", 1), batch.get("place", 0)
        if not exact:
            return [one], None
        other = dict(one)
        if batch.get("guided") and one.get("guidance_scale", 2.0) <= 1:
            other["guidance_scale"] = 2.0  # others of the pass had guidance
        return [one if k == place else other for k in range(size)], place

    def _arguments(self, images: list[dict[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the task; images by their files."""
        arguments = dict(self.settings.get("arguments", {}))
        if self.settings["task"] == "text_to_image":
            size = {n: self.settings[n] for n in ("height", "width") if n in self.settings}
            return {**size, **arguments}
        for name in IMAGE_ARGUMENTS:
            if name not in arguments or name in given:
                continue
            each = (image.get("arguments", {}).get(name, {}) for image in images)
            files = [one.get("file") for one in each]
            for file in files:
                if file is None or not Path(file).is_file():
                    where = "was no file" if file is None else f"is not there: {file}"
                    raise UserError(
                        f"the {name} that {self.file} was made from {where}. Give it anew."
                    )
            arguments[name] = files[0] if len(set(files)) == 1 else files
        return arguments

    def verdict(self, output: PipelineOutput, given: Mapping[str, Any]) -> str:
        """How what `run` gave relates to the file.

        Args:    given: as for `run`.
        """
        if given:
            return f"{self.file}: with other {', '.join(given)}"
        image = output.images[0]
        if len(output.images) > 1:
            image = grid(output.images, self.settings.get("columns"))
        other = ", ".join(self._differences(output.settings[0]))
        if self.record.program != OURS:
            found = f"made as {self.record.program} recorded, whose noise and arithmetic are others"
        else:
            found = self._likeness(image)
        return f"{self.file}: {found}{f'; {other}' if other else ''}"

    def _likeness(self, image: Image) -> str:
        from PIL.Image import open as open_image

        recorded = self.settings.get("pixels")
        same = pixels_hash(image) == recorded
        with open_image(self.file) as old:
            lossless = old.format in _LOSSLESS
            if lossless and recorded not in (None, pixels_hash(old)):
                which = "the image as it was made" if same else "not the image as it was made"
                return f"edited after it was made; this is {which}"
            if same:
                return "the same image, bit for bit"
            if not lossless or old.size != image.size:
                return f"not the same image to the bit; {old.format} cannot tell by how much"
            both = [np.asarray(one.convert("RGBA"), dtype=int) for one in (old, image)]
        most = int(np.abs(both[0] - both[1]).max())
        return f"{'the same' if most <= 1 else 'another'} image, differing by up to {most}/255"

    def _differences(self, settings: Mapping[str, Any]) -> list[str]:
        """What was not as it had been."""
        old, new = _facts(self.settings), _facts(settings)
        return [
            f"{name} {new.get(name, 'none')} instead of {old[name]}"
            for name in old
            if old[name] != new.get(name)
        ]

    @contextmanager
    def threads(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Compute with the recorded number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(before if given else self.settings.get("threads", before))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _of_each(images: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What each image of a call has of its own; the first one's where there are others now."""
    call: dict[str, Any] = {"num_images_per_prompt": 1}
    for name in _EACH:
        values = [one[name] for one in images if name in one]
        if values:
            replaced = {"prompt", "num_images_per_prompt"} & given.keys()
            call[name] = values[0] if replaced else values
    return call


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What else an image depends on; only what is known."""
    facts = {name: settings.get(name) for name in ("device", "dtype", "threads", "machine")}
    facts |= settings.get("versions", {})
    for name, of in (("model", "hash"), ("vae", "vae_hash")):
        facts[name] = settings.get("model", {}).get(of)
    for name, kind in (("LoRA", "loras"), ("word", "embeddings")):
        shown = (f"{o.get('hash')} at {o.get('weight', 1.0)}" for o in settings.get(kind, ()))
        facts[name] = ", ".join(shown)
    for name in IMAGE_ARGUMENTS:
        facts[name] = settings.get("arguments", {}).get(name, {}).get("hash")
    return {name: fact for name, fact in facts.items() if fact}
