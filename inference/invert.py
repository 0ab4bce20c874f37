"""Find the noise of an image, and draw the image from it again.

    python inference/invert.py cat.png --prompt "a cat painting" --output back.png
    python inference/invert.py cat.png --prompt "a cat" --edit "a dog" --edit "a cat on blue"

Writes one row: the image, what the autoencoder keeps of it, the round trip, and one image for
each --edit, drawn from the same noise with another prompt. Prints how near the round trip comes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.errors import UserError, command
from latentdiff.files import atomic_file
from latentdiff.images import check_image_file, check_place

if TYPE_CHECKING:
    from latentdiff.pipelines.task import PipelineOutput


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("image", type=Path, help="any image file; cropped and resized to the model's size")
    add("--prompt", default="", help="what it shows; default: empty")
    add("--edit", action="append", default=[], metavar="TEXT", help="another prompt; repeatable")
    add("--output", "-o", type=Path, default=Path("inverted.png"), help="default: %(default)s")
    add("--noise", type=Path, metavar="FILE", help="write x_T there as safetensors, key `latents`")
    add("--model", help="folder, single file or Hugging Face id; default: the embedded model")
    add("--steps", type=int, default=50, help="sampling steps; default: %(default)s")
    add("--iterations", type=int, default=3, help="network calls per step; default: %(default)s")
    add("--guidance", type=float, default=1.0, help="of the way there and back; %(default)s = off")
    add("--edit-guidance", type=float, default=3.0, help="of the edits; default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> tuple[list[Any], list[Any], Any, float]:
    """The row of images, the settings of those that were drawn, x_T, and the round trip's PSNR
    against the autoencoder's own in dB."""
    import torch

    from latentdiff.data.images import to_rgb
    from latentdiff.images import psnr, to_output, to_pil
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.image_inputs import decoded_images
    from latentdiff.pipelines.inputs import device_of
    from latentdiff.pipelines.inversion import image_tensors

    (image,) = decoded_images(args.image, "image", to_rgb)
    device = device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model).to(device)
    found = pipeline.invert(
        image,
        args.prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        iterations=args.iterations,
    )

    def draw(prompt: str, guidance: float) -> PipelineOutput:
        return pipeline(
            prompt,
            latents=found.latents,
            sampler="ddim",
            num_inference_steps=args.steps,
            guidance_scale=guidance,
            output_type="pt",
            progress=False,
        )

    with torch.no_grad():
        kept = pipeline.autoencoder.decode(found.image_latents.to(pipeline.device))
    kept = to_output(kept, "pt").cpu()
    back = draw(args.prompt, args.guidance)
    drawn = [back, *(draw(text, args.edit_guidance) for text in args.edit)]
    given = image_tensors(image, pipeline.default_size) / 2 + 0.5
    images = to_pil(torch.cat([given, kept, *(one.images.cpu() for one in drawn)]))
    settings = [one.settings[0] for one in drawn]
    return images, settings, found.latents, float(psnr(back.images.cpu(), kept))


def write_noise(file: Path, noise: Any) -> None:
    """Write x_T. Raises: UserError: it cannot be written."""
    from latentdiff.weights import save_tensors

    try:
        with atomic_file(file) as new:
            save_tensors({"latents": noise.contiguous()}, new)
    except OSError as error:
        raise UserError(f"--noise: {file} cannot be written ({error}).") from error


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    args = parse(arguments)
    check_image_file(args.output, "--output")
    if args.noise is not None:
        check_place(args.noise, "--noise")
    images, settings, noise, decibels = run(args)
    from latentdiff.images import grid
    from latentdiff.pipelines.metadata import of_grid, write

    columns = len(images)
    written = write(grid(images, columns), args.output, of_grid(settings, columns))
    if args.noise is not None:
        write_noise(args.noise, noise)
    print(f"round trip against the autoencoder's own image: {decibels:.1f} dB")
    print(written)


if __name__ == "__main__":
    sys.exit(main())
