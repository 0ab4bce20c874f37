"""Learned words: files of others, read as diffusers reads them; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding, write_embedding
from latentdiff.models.prompts import add_word
from tests.random_models import TEXT_WIDTH, make_pipeline

VECTORS = torch.randn(3, TEXT_WIDTH, generator=torch.Generator().manual_seed(7))
TEXTS = ["a <My-cat> dog", "<my-cat>", "a dog", "pain, <MY-CAT>'s cat (<my-cat>)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


def open_theirs(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs


# diffusers spells a word of several vectors out only where its name has no capitals.
@pytest.mark.parametrize(("word", "count"), [("<My-cat>", 1), ("<my-cat>", 3)])
def test_diffusers_reads_our_file_and_draws_the_same(
    folder: Path, pipeline: LatentDiffusionPipeline, tmp_path: Path, word: str, count: int
) -> None:
    file = write_embedding(tmp_path / "learned_embeds.safetensors", word, VECTORS[:count])
    theirs = open_theirs(folder)
    theirs.load_textual_inversion(str(tmp_path))
    before = pipeline.text_encoder.encode(["a dog", "a cat"])
    assert pipeline.load_embedding(file) == word
    assert torch.equal(pipeline.text_encoder.encode(["a dog", "a cat"]), before)
    texts = [text.lower() for text in TEXTS]
    with torch.no_grad():
        expected = [theirs.encode_prompt(t, "cpu", 1, False)[0][0] for t in texts]
        found = pipeline.text_encoder.encode(TEXTS)
    torch.testing.assert_close(found, torch.stack(expected))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "latents": noise}
    one, two = theirs(texts[0], **options), pipeline(TEXTS[0], progress=False, **options)
    difference = np.asarray(one.images[0], int) - np.asarray(two.images[0], int)
    assert np.abs(difference).max() <= 2 and np.asarray(two.images[0]).std() >= 20


def test_every_layout_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    many, one = VECTORS.clone(), VECTORS[0].clone()
    save_file({"<a>": one}, tmp_path / "one.safetensors")
    save_file({"emb_params": many.half()}, tmp_path / "easy.safetensors")
    torch.save({"<a>": many}, tmp_path / "learned_embeds.bin")
    parameter = torch.nn.Parameter(many)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "cat-2"}
    torch.save({**a1111, "step": 5, "sd_checkpoint": None}, tmp_path / "a.pt")
    torch.save({**a1111, "name": None}, tmp_path / "unnamed.pt")
    torch.save(many, tmp_path / "bare.pt")
    for name, token, vectors in [
        ("one.safetensors", "<a>", one[None]),
        ("easy.safetensors", "easy", many.half().float()),
        ("", "<a>", many),
        ("a.pt", "cat-2", many),
        ("unnamed.pt", "unnamed", many),
        ("bare.pt", "bare", many),
    ]:
        found = read_embedding(tmp_path / name)
        assert found.token == token, name
        assert torch.equal(found.vectors, vectors), name
        assert not found.vectors.requires_grad


def test_diffusers_reads_a1111_as_we_do(
    folder: Path, pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    data = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "cat-2"}
    torch.save(data, tmp_path / "a.pt")
    theirs = open_theirs(folder)
    theirs.load_textual_inversion(str(tmp_path), weight_name="a.pt", token="<x>")
    pipeline.load_embedding(tmp_path / "a.pt", token="<x>")
    with torch.no_grad():
        expected = theirs.encode_prompt("a <x>, dog", "cpu", 1, False)[0]
    torch.testing.assert_close(pipeline.text_encoder.encode(["a <x>, dog"]), expected)


def test_a_model_with_words_is_saved_with_them(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    add_word(pipeline.text_encoder, "<my-cat>", VECTORS)
    add_word(pipeline.text_encoder, "dog-2", VECTORS[:1])
    pipeline.save_pretrained(tmp_path / "new")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "new")
    texts = [*TEXTS, "dog-20", "dog-2 <my-cat>"]
    assert torch.equal(again.text_encoder.encode(texts), pipeline.text_encoder.encode(texts))
    theirs = open_theirs(tmp_path / "new")
    expected = [theirs.encode_prompt(text, "cpu", 1, False)[0][0] for text in texts[-2:]]
    torch.testing.assert_close(again.text_encoder.encode(texts[-2:]), torch.stack(expected))


def test_a_word_of_several_vectors_stays_whole_in_long_prompts(
    pipeline: LatentDiffusionPipeline,
) -> None:
    ids = add_word(pipeline.text_encoder, "<my-cat>", VECTORS)
    text = "cat " * 12 + "(<my-cat>:1.2) dog"
    read = pipeline.read_prompt(text)
    assert [len(chunk.ids) for chunk in read.chunks] == [12, 4]
    assert read.chunks[1].ids[:3] == tuple(ids)
    assert read.chunks[1].weights == (1.2, 1.2, 1.2, 1.0)
    assert read.tokens + 2 == pipeline.text_encoder.count_tokens("cat " * 12 + "<my-cat> dog")
    with pytest.warns(UserWarning, match="cut off: '<my-cat> dog'"):
        row = pipeline.text_encoder.tokenizer(["cat " * 12 + "<my-cat> dog"])[0]
    assert len(row) == pipeline.text_encoder.max_length


@pytest.mark.parametrize(
    ("word", "without", "within"),
    [
        (
            "zed",
            ["zedd", "azed", "zed_1x", "zed2", "Zedé"],
            ["zed", "a ZED, dog", "(zed)", "zed's"],
        ),
        ("cat-2", ["cat-20", "xcat-2", "cat-2s"], ["cat-2", "dog,cat-2.", "pain cat-2-dog"]),
        ("<zed>", ["zed", "< zed>"], ["<zed>s", "a<zed>b", "<<zed>>"]),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_word_is_not_met_within_a_longer_one(
    pipeline: LatentDiffusionPipeline, word: str, without: list[str], within: list[str], count: int
) -> None:
    encoder = pipeline.text_encoder
    before = encoder.encode(without), [encoder.tokenizer.pieces(text) for text in without]
    ids = add_word(encoder, word, VECTORS[:count])
    assert [encoder.tokenizer.pieces(text) for text in without] == before[1]
    assert torch.equal(encoder.encode(without), before[0])
    for text in within:
        assert tuple(ids) in encoder.tokenizer.pieces(text), text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat", "'cat' is a word that the text encoder knows already"),
        ("CAT", "knows already"),
        ("a", "knows already"),
        ("my cat", "must be without spaces"),
        ("", "must be without spaces"),
        ("<known>", "knows already"),
        ("<KNOWN>", "knows already"),
        ("<known>_2", "or part of one"),
    ],
)
def test_names_that_mean_something_are_refused(
    pipeline: LatentDiffusionPipeline, name: str, message: str
) -> None:
    encoder = pipeline.text_encoder
    add_word(encoder, "<known>", VECTORS[:1])
    before = encoder.encode(TEXTS[2:3]), encoder.tokenizer, encoder.module.config["vocab_size"]
    with pytest.raises(UserError, match=message):
        add_word(encoder, name, VECTORS)
    assert torch.equal(encoder.encode(TEXTS[2:3]), before[0])
    assert encoder.tokenizer is before[1]
    assert encoder.module.config["vocab_size"] == before[2]


class Code:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_files_that_do_not_fit_are_refused(
    pipeline: LatentDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    def write(name: str, data: Any) -> Path:
        file = tmp_path / name
        (save_file if name.endswith("safetensors") else torch.save)(data, file)
        return file

    wide, two = torch.ones(2, 768), {"<a>": torch.ones(4), "<b>": torch.ones(4)}
    sdxl = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    broken = write("broken.safetensors", {"<a>": VECTORS})
    broken.write_bytes(broken.read_bytes()[:-9])
    for file, message in [
        (write("wide.safetensors", {"<a>": wide}), rf"\(vectors, {TEXT_WIDTH}\).*got \(2, 768\)"),
        (write("nan.safetensors", {"<a>": VECTORS / 0 * 0}), "NaN or infinity"),
        (write("two.safetensors", two), r"one word; it holds 2 entries \(<a>, <b>\)"),
        (write("sdxl.safetensors", sdxl), "for SDXL"),
        (write("unet.pt", {f"layer.{i}": torch.ones(2, 2) for i in range(9)}), r"9 entries.*…"),
        (write("cube.pt", {"<a>": torch.ones(2, 2, 2)}), r"\(2, 2, 2\).*not \(vectors, width\)"),
        (write("whole.pt", {"<a>": torch.ones(2, dtype=torch.int64)}), "real numbers"),
        (write("list.pt", [1]), "it holds a list"),
        (write("code.pt", {"<a>": Code()}), "a pickle that holds more than tensors"),
        (broken, "cannot be read"),
        (tmp_path / "none.pt", "does not exist"),
        (tmp_path, "holds neither learned_embeds.safetensors"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline.load_embedding(file)
    assert "code was run" not in capsys.readouterr().out
    assert len(pipeline.text_encoder.tokenizer.pieces("<a>")) > 1
