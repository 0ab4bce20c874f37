"""Parts of prompts that are drawn: which choices a file has, and that an image's own seed draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.wildcards import Wildcards
from tests.random_models import make_pipeline


def folder_of(folder: Path, **files: bytes | str) -> Wildcards:
    for name, text in files.items():
        file = folder / f"{name.replace('8', '/')}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Wildcards(folder)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (b"\xef\xbb\xbfred\r\nblue\r\n", {"red", "blue"}),
        (b"# c\n\ncat\n  dog  \n\n", {"cat", "dog"}),
        ("weiß\rblau".encode(), {"weiß", "blau"}),
        ("a\u2028b\nc".encode("utf-16"), {"a\u2028b", "c"}),
    ],
)
def test_the_choices_of_a_file_are_its_lines(
    text: bytes, choices: set[str], tmp_path: Path
) -> None:
    wild = folder_of(tmp_path, w=text)
    drawn = Counter(wild.expand(["__w__"], seed)[0] for seed in range(1000))
    assert drawn.keys() == choices and min(drawn.values()) >= 400


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{a|b} {a|b}", {"a a", "a b", "b a", "b b"}),
        ("{a|{b|c} d|}", {"a", "b d", "c d", ""}),
        ("a {cat} {} __ _x_ snake_case", {"a {cat} {} __ _x_ snake_case"}),
        ("(__w__:1.2)__w__", {"(1:1.2)1", "(1:1.2)2", "(2:1.2)1", "(2:1.2)2"}),
        ("__sub/deep__", {"<1>", "<2>", "x"}),
        ("{__w__|x}", {"1", "2", "x"}),
    ],
)
def test_parts_within_parts(text: str, found: set[str], tmp_path: Path) -> None:
    wild = folder_of(tmp_path, w="1\n2", sub8deep="{<__w__>|x}")
    assert {wild.expand([text], seed)[0] for seed in range(100)} == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a __anmal__", r"__anmal__: there is no anmal.txt in .* Did you mean 'animal'\?"),
        ("__../secret__", "there is no ../secret.txt"),
        ("__latin__", "latin.txt cannot be read: line 2 is not UTF-8 text"),
        ("__none__", "none.txt holds no choice"),
        ("__loop__", "draw from themselves"),
        ("{2$$a|b}", "number or weight in '2\\$\\$a' is not supported"),
        ("{0.5::a|b}", "number or weight in '0.5::a' is not supported"),
    ],
)
def test_what_cannot_be_drawn_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    files: dict[str, Any] = {"animal": "cat", "latin": b"a\n\xe9", "none": "#\n \n"}
    wild = folder_of(tmp_path / "wild", loop="__loop__", **files)
    with pytest.raises(UserError, match=message):
        for seed in range(20):
            wild.expand([text], seed)
    with pytest.raises(UserError, match="must be a folder"):
        Wildcards(tmp_path / "secret.txt")


def test_an_image_draws_from_its_own_seed(tmp_path: Path) -> None:
    folder_of(tmp_path, w="\n".join(f"w{k}" for k in range(20)))
    make_pipeline().save_pretrained(tmp_path / "model")
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    text, options = "{a|b|c|d} __w__", {"num_inference_steps": 1, "progress": False}

    def run(prompt: Any, **more: Any) -> tuple[list[str], torch.Tensor]:
        result = pipeline(prompt, wildcards=tmp_path, output_type="pt", **options, **more)
        return [read.text for read in result.prompts], result.images

    texts, images = run([text] * 4, seed=7)
    assert len(set(texts)) == 4
    again, same = run(text, num_images_per_prompt=4, seed=[7, 8, 9, 10])
    assert again == texts and torch.equal(same, images)
    alone, image = run(text, seed=9)
    assert alone == texts[2:3]
    assert (image[0] - images[2]).abs().max() <= 1 / 255
    plain = pipeline(texts, seed=7, output_type="pt", **options).images
    assert torch.equal(plain, images)
    untouched = pipeline(text, **options).prompts[0].text
    assert untouched == text
    negative = pipeline("cat", negative_prompt=text, wildcards=tmp_path, seed=7, **options)
    assert negative.prompts[0].text == "cat"
    with pytest.raises(UserError, match="one for each image"):
        pipeline(["a", "b"], seed=[1, 2, 3])
