"""Tokenizer folders with words and marks beside the vocabulary; transformers is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import UserError
from latentdiff.models.prompts import add_word
from latentdiff.models.tokenizer import (
    ClipTokenizer,
    clip_tokenizer,
    clip_vocabulary,
    describe_tokenizer,
    load_tokenizer,
    tokenizer_of,
)
from tests.random_models import (
    BOS,
    EOS,
    MAX_TOKENS,
    make_tokenizer,
    vocabulary,
    write_plain_vocabulary,
)

VOCABULARY, _ = vocabulary()
NEXT = len(VOCABULARY)
TEXTS = [
    "a <cat-toy> cat",
    "a<cat-toy>cat! DOG",
    "<Cat-Toy> <CAT-TOY> paint",
    "<mark> a<x>b <x> <y> a  <z>  b",
    "<|endoftext|> <|ENDOFTEXT|> cat",
]


def entry(content: str, special: bool = False, **changes: bool) -> dict[str, Any]:
    """A token as transformers writes it."""
    usual = {"lstrip": False, "normalized": not special, "rstrip": False, "single_word": False}
    return {"content": content, "special": special} | usual | changes


def both_marks() -> dict[str, Any]:
    return {str(VOCABULARY[mark]): entry(mark, special=True) for mark in (BOS, EOS)}


def write(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> None:
    """A folder as SD 1.x has it, changed by more fields and files."""
    write_plain_vocabulary(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


def write_whole(folder: Path, **files: Any) -> None:
    """A folder with tokenizer.json."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<cat-toy>", "<x>"])
    tokenizer.save_pretrained(folder)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


FORMS: dict[str, Callable[[Path], None]] = {
    "added_tokens.json": lambda f: write(f, added_tokens={"<cat-toy>": NEXT, "<x>": NEXT + 1}),
    "added_tokens_decoder": lambda f: write(
        f, {"added_tokens_decoder": {**both_marks(), str(NEXT): entry("<Cat-Toy>")}}
    ),
    "decoder out of order, each with its own rules": lambda f: write(
        f,
        {
            "added_tokens_decoder": {
                str(NEXT + 3): entry("<cat-toy>", normalized=False),
                str(NEXT): entry("<x>", single_word=True),
                str(NEXT + 1): entry("<y>", lstrip=True),
                str(NEXT + 2): entry("<z>", rstrip=True),
            }
        },
    ),
    "decoder over the older files": lambda f: write(
        f,
        {"added_tokens_decoder": {str(NEXT): entry("<x>")}},
        added_tokens={"<cat-toy>": NEXT},
        special_tokens_map={"pad_token": "!"},
    ),
    "tokenizer.json": write_whole,
    "tokenizer.json and more": lambda f: write_whole(f, added_tokens={"<y>": NEXT + 2}),
    "additional special tokens": lambda f: write(
        f, special_tokens_map={"additional_special_tokens": ["<mark>"], "pad_token": "!"}
    ),
    "extra special tokens of the configuration": lambda f: write(
        f, {"extra_special_tokens": ["<mark>"]}, added_tokens={"<mark>": NEXT, "<x>": NEXT + 1}
    ),
    "a special token out of the vocabulary (SD 2.x)": lambda f: write_plain_vocabulary(
        f, pad_token="!"
    ),
}


def theirs(folder: Path) -> Any:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def ids(tokenizer: ClipTokenizer) -> list[list[int]]:
    """Without the many vectors that stand for one word in our pieces."""
    return [tokenizer.backend.encode(text).ids for text in TEXTS]


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    FORMS[request.param](tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_same_ids_as_transformers(folder: Path) -> None:
    found, expected = load_tokenizer(folder, MAX_TOKENS), theirs(folder)
    assert ids(found) == [expected(text).input_ids for text in TEXTS]
    assert found.pad_id == expected.pad_token_id


@pytest.mark.parametrize("without", [None, "tokenizer.json"])
def test_words_survive_being_saved(folder: Path, without: str | None, tmp_path: Path) -> None:
    expected = theirs(folder)
    load_tokenizer(folder, MAX_TOKENS).save(tmp_path / "saved")
    if without is not None:
        (tmp_path / "saved" / without).unlink()
    again = load_tokenizer(tmp_path / "saved", MAX_TOKENS)
    for row, text in zip(ids(again), TEXTS, strict=True):
        assert row == expected(text).input_ids == theirs(tmp_path / "saved")(text).input_ids
    assert again.pad_id == expected.pad_token_id
    found = tokenizer_of(describe_tokenizer(again), MAX_TOKENS)
    assert ids(found) == ids(again)


def test_a_word_taught_later_is_there_for_transformers(tmp_path: Path) -> None:
    import torch

    from latentdiff.formats.folder import load_components, save_components
    from tests.random_models import TEXT_WIDTH, make_pipeline, make_text_model

    pipe = make_pipeline()
    pipe.text_encoder = make_text_model(vocab_size=NEXT + 1)
    pipe.save_pretrained(tmp_path / "model")
    FORMS["added_tokens_decoder"](tmp_path / "model" / "tokenizer")
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").unlink()
    components = load_components(tmp_path / "model")
    assert add_word(components.text_encoder, "<dog>", torch.ones(2, TEXT_WIDTH)) == [
        NEXT + 1,
        NEXT + 2,
    ]
    saved = save_components(tmp_path / "saved", components) / "tokenizer"
    vocab = VOCABULARY
    expected = [vocab[BOS], NEXT, NEXT + 1, NEXT + 2, vocab["cat</w>"], vocab[EOS]]
    assert theirs(saved)("<cat-toy> <dog><dog>_1 cat").input_ids == expected
    tokens = load_components(tmp_path / "saved").text_encoder.tokenizer(["<cat-toy> <dog> cat"])
    assert tokens[0, :6].tolist() == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"added_tokens": {"<gap>": NEXT + 5}}, f"'<gap>' has the id {NEXT + 5}.* gives {NEXT}"),
        ({"added_tokens": {"cat</w>": NEXT}}, f"id {NEXT}.* gives {VOCABULARY['cat</w>']}"),
        ({"added_tokens": {"<a>": "first"}}, "cannot be read"),
        ({"added_tokens": ["<a>"]}, "must hold a JSON object"),
        ({"config": {"added_tokens_decoder": {"5": 3}}}, "cannot be read"),
        ({"config": {"added_tokens_decoder": {"5": {}}}}, "cannot be read"),
        ({"config": {"model_max_length": "long"}}, "cannot be read"),
        ({"config": {"model_max_length": 1}}, "model_max_length must be at least 3"),
        ({"vocab": {"a": -1}}, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path, **change)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path, MAX_TOKENS)


def test_clips_vocabulary_with_more_is_described_in_few_words() -> None:
    size = len(clip_vocabulary())
    words = [entry("!", special=True), entry("<cat-toy>"), entry("<Dog>", normalized=False)]
    tokenizer = clip_tokenizer("!", 77, words)
    described = describe_tokenizer(tokenizer)
    assert len(json.dumps(described)) < 1000
    again = tokenizer_of(json.loads(json.dumps(described)), 77)
    for one in (tokenizer, again):
        assert one(["a <cat-toy>! <Dog>"])[0, :6].tolist() == [49406, 320, size, 0, size + 1, 49407]
