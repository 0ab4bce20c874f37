"""The images of a prompt file, on any number of processes, each in a file of its own.

Image k of all rows is the file NAME-k and the work of process k mod N; processes never talk to each
other. A file appears all at once and holds a hash of what was asked for, so what was killed is
started again, on as many processes as there are then, and only missing images are made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from latentdiff.cli.generate import given, opened, say_flagged
from latentdiff.cli.prompt_file import check_lines, noted, read_prompt_file
from latentdiff.errors import UserError
from latentdiff.files import parse_json
from latentdiff.images import check_image_file, contact_sheet, is_whole, read_texts, save_image
from latentdiff.models.prompts import NETWORK
from latentdiff.pipelines.hashes import file_hash
from latentdiff.pipelines.inputs import check_counts, check_seed
from latentdiff.pipelines.metadata import OURS, write
from latentdiff.pipelines.prompt_loras import Files, LoraFolder
from latentdiff.pipelines.styles import read_styles, styled
from latentdiff.pipelines.task import DEFAULT_STEPS
from latentdiff.pipelines.two_pass import STRENGTH, enlarged_size
from latentdiff.pipelines.wildcards import Wildcards

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

#: What may differ between the images of one call of the pipeline.
_OWN = ("prompt", "negative_prompt", "guidance_scale", "seed")
#: Formats whose files say how their image was made.
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
#: The name of the hash among the settings in a file.
_REQUEST = "request"
_hash = cache(file_hash)
#: Of the settings of an image, where its model was and what made it.
_ELSEWHERE = (
    *("source", "name", "revision", "vae", "file"),
    *("device", "threads", "machine", "versions"),
)


class Wanted(NamedTuple):
    """One image: the line that asks for it, its file, and the pipeline's options."""

    line: int
    file: Path
    options: dict[str, Any]
    loras: Files
    """What its prompt asks for, see `prompt_loras`."""


def generate_all(args: argparse.Namespace) -> str:
    """Make what is missing. Returns: what was done. Raises: UserError: before any is made."""
    batch_size = 16 if args.batch_size is None else args.batch_size
    check_counts(batch_size=batch_size)
    if args.contact_sheet:
        check_image_file(args.contact_sheet, "--contact-sheet")
    if args.output.suffix.lower() not in _ENDINGS:
        raise UserError(f"--output must end in {', '.join(_ENDINGS)}; got {args.output}.")
    images = wanted(args)
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    pipeline = opened(_on_this_device(args, ranks), {})
    check(pipeline, images, args.prompt_file)
    facts = decisive(pipeline)
    mine = images[rank::ranks]
    missing = [one for one in mine if not is_there(one, facts)]
    done = len(mine) - len(missing)
    silent = args.quiet or rank > 0
    with tqdm(total=len(mine), initial=done, unit="image", leave=False, disable=silent) as bar:
        for some in batches(missing, batch_size):
            make(pipeline, some, batch_size, facts)
            bar.update(len(some))
    if args.contact_sheet and all(is_there(one, facts) for one in images):
        # Of several processes the last one finds all of them.
        save_image(contact_sheet([one.file for one in images], args.columns), args.contact_sheet)
    own = f"process {rank} of {ranks}: " if ranks > 1 else ""
    last = f" to {images[-1].file.name}" if len(images) > 1 else ""
    return f"{own}{len(missing)} images made, {done} were there: {images[0].file}{last}"


def wanted(args: argparse.Namespace) -> list[Wanted]:
    """Every image of the prompt file. Raises: UserError: naming the lines that are wrong."""
    common = given(args)
    several, first = common.pop("num_images_per_prompt", 1), common.pop("seed", 0)
    folder, guidance = common.pop("wildcards", None), common.pop("guidance_scale", None)
    if guidance is not None:
        if len(guidance) > 1:
            raise UserError("--guidance must be one number beside --prompts; rows have their own.")
        common["guidance_scale"] = guidance[0]
    check_counts(num_images_per_prompt=several)
    styles = read_styles(args.styles) if args.style else {}
    choices = Wildcards(folder) if folder else None
    files = LoraFolder(common["lora_dir"]) if "lora_dir" in common else None
    images, problems = list[Wanted](), dict[int, str]()
    for line, own in read_prompt_file(args.prompt_file):
        options = {**common, **own}
        count, seed = options.pop("num_images_per_prompt", several), options.pop("seed", None)
        texts = styled(styles, args.style, options["prompt"], options.get("negative_prompt", ""))
        for k in range(count):
            number = len(images)
            file = args.output.with_name(f"{args.output.stem}-{number:05d}{args.output.suffix}")
            drawing = first + number if seed is None else seed + k
            with noted(problems, line):
                check_seed(drawing, 1)
                prompt, negative = choices.expand(texts, drawing) if choices else texts
                of_image = {"prompt": prompt, "negative_prompt": negative, "seed": drawing}
                loras = files.split(prompt)[1] if files else ()
                images.append(Wanted(line, file, {**options, **of_image}, loras))
    check_lines(args.prompt_file, problems)
    return images


def _on_this_device(args: argparse.Namespace, ranks: int) -> argparse.Namespace:
    """The arguments with this process's own GPU, if it is one of several."""
    import torch

    from latentdiff.train.distributed import take_cores

    if ranks > 1 and args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif ranks > 1:
        take_cores()
    return args


def check(pipeline: LatentDiffusionPipeline, images: Sequence[Wanted], file: Path) -> None:
    """Raises: UserError: naming the lines that ask for what this model cannot do."""
    given = images[0].options  # the command line's, of all rows
    hires = None
    if "hires_scale" in given:
        hires = given["hires_scale"], given.get("hires_strength", STRENGTH)

    @cache
    def settings(
        height: int | None, width: int | None, steps: int, sampler: str | None, spacing: str | None
    ) -> None:
        size = pipeline.image_size(height, width)
        if hires is not None:
            enlarged_size(size, *hires, pipeline.autoencoder.downscale)
        pipeline.sampling_plan(steps, sampler=sampler, spacing=spacing)

    @cache
    def fits(lora: Path) -> None:
        with pipeline.loras.also([(lora, 0)]):
            pass

    problems = dict[int, str]()
    for line, _, options, loras in images:
        with noted(problems, line):
            get = options.get
            steps = get("num_inference_steps", DEFAULT_STEPS)
            settings(get("height"), get("width"), steps, get("sampler"), get("timestep_spacing"))
            for lora, _ in loras:
                fits(lora)
            prompt = NETWORK.sub("", options["prompt"]) if loras else options["prompt"]
            for text in (prompt, options["negative_prompt"]):
                pipeline.read_prompt(text, get("prompt_syntax", "plain"))
    check_lines(file, problems)


def decisive(pipeline: LatentDiffusionPipeline) -> Any:
    """What of a pipeline decides its images: what is in its files, wherever they are."""
    from latentdiff.pipelines.settings import surroundings

    return _content(surroundings(pipeline))


def _content(facts: Any) -> Any:
    if isinstance(facts, list):
        return [_content(one) for one in facts]
    if isinstance(facts, dict):
        return {name: _content(one) for name, one in facts.items() if name not in _ELSEWHERE}
    return facts


def batches(images: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    """Images of the same size and settings together, in the order of each group's first."""
    groups: dict[str, list[Wanted]] = {}
    for one in images:
        shared = {name: value for name, value in one.options.items() if name not in _OWN}
        groups.setdefault(_text(shared), []).append(one)
    for group in groups.values():
        yield from (group[k : k + most] for k in range(0, len(group), most))


def make(
    pipeline: LatentDiffusionPipeline, images: Sequence[Wanted], batch_size: int, facts: Any
) -> None:
    """Make images of the same settings and write each. Raises: UserError: one cannot be."""
    options = dict(images[0].options)
    usual = {"guidance_scale": pipeline.default_guidance}
    for name in _OWN:
        options[name] = [{**usual, **one.options}[name] for one in images]
    output = pipeline(**options, batch_size=batch_size, progress=False)
    say_flagged(output)
    for one, image, settings in zip(images, output.images, output.settings, strict=True):
        write(image, one.file, {**settings, _REQUEST: request(one, facts)})


def is_there(one: Wanted, facts: Any) -> bool:
    """Whether an image's file is whole, and what was asked for."""
    try:
        settings = parse_json(read_texts(one.file).get(OURS, "{}"), one.file)
    except UserError:
        return False
    return settings.get(_REQUEST) == request(one, facts) and is_whole(one.file)


def request(one: Wanted, facts: Any) -> str:
    """A hash of all that decides an image: its options, and the model's `facts`."""
    options = {name: value for name, value in one.options.items() if name != "lora_dir"}
    loras = [[_hash(file), weight] for file, weight in one.loras]
    return hashlib.sha256(_text([options, loras, facts]).encode()).hexdigest()[:16]


def _text(value: Mapping[str, Any] | list[Any]) -> str:
    return json.dumps(value, sort_keys=True)
