"""Prompts of several chunks: nothing is lost, and states are those of the tower on each chunk."""

from __future__ import annotations

import random

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.models.clip_text import TextEncoder, load_text_encoder
from latentdiff.models.prompts import (
    Run,
    chunks_of,
    comma_reach,
    emphasised,
    encode_prompts,
    read_prompt,
)
from tests.random_models import MAX_TOKENS, make_text_model, make_tokenizer

ROOM = MAX_TOKENS - 2
COMMA = 9


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    root = tmp_path_factory.mktemp("text")
    make_text_model().save_pretrained(root / "text_encoder")
    make_tokenizer().save_pretrained(root / "tokenizer")
    return load_text_encoder(root / "text_encoder", root / "tokenizer")


def encode(encoder: TextEncoder, texts: list[str], syntax: str = "plain") -> list[torch.Tensor]:
    return encode_prompts(encoder, [read_prompt(encoder, text, syntax) for text in texts])


def pieces(text: str) -> list[tuple[int, ...]]:
    """Digits as tokens; a letter is a learned word of three vectors."""
    return [(int(sign),) if sign.isdigit() else (ord(sign),) * 3 for sign in text]


@pytest.mark.parametrize("alphabet", ["012345678", "0123456789", "019ab"])
def test_nothing_is_lost_and_no_learned_word_is_cut(alphabet: str) -> None:
    for seed in range(100):
        draw = random.Random(seed)
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 80)))
        chunks = chunks_of([[Run(text, 1.0)]], pieces, 15, COMMA)
        joined = [token for chunk in chunks for token in chunk.ids]
        assert joined == [token for piece in pieces(text) for token in piece]
        for chunk in chunks:
            assert len(chunk.ids) == len(chunk.weights) <= 15
            assert all(chunk.ids.count(ord(letter)) % 3 == 0 for letter in "ab")
        if COMMA not in joined and max(joined, default=0) < 10:
            assert all(len(chunk.ids) == 15 for chunk in chunks[:-1])


def test_a_phrase_moves_over_with_what_follows_its_comma() -> None:
    room, reach = 75, 20
    assert comma_reach(room) == reach
    for after, moves in [(1, True), (19, True), (20, False), (0, False)]:
        text = "1" * (room - 1 - after) + "9" + "2" * after + "3"
        first = chunks_of([[Run(text, 1.0)]], pieces, room, COMMA)[0]
        assert len(first.ids) == (room - after if moves else room), after
    # A comma that is the first not to fit does not move anything.
    assert len(chunks_of([[Run("1" * 74 + "9" * 2, 1.0)]], pieces, room, COMMA)[0].ids) == room


def test_parts_and_weights() -> None:
    parts = [[Run("12", 1.0), Run("3", 1.5)], [], [Run("4", 0.5)], []]
    chunks = chunks_of(parts, pieces, 15, COMMA)
    assert [chunk.ids for chunk in chunks] == [(1, 2, 3), (), (4,)]
    assert [chunk.weights for chunk in chunks] == [(1, 1, 1.5), (), (0.5,)]
    assert [chunk.ids for chunk in chunks_of([[]], pieces, 15, COMMA)] == [()]
    with pytest.raises(UserError, match="3 vectors, and the text encoder takes 2"):
        chunks_of([[Run("a", 1.0)]], pieces, 2, COMMA)


@torch.no_grad()
def test_states_are_the_tower_s_on_every_chunk(encoder: TextEncoder) -> None:
    text = "a cat, a dog and then some more words that do not fit"
    theirs = make_tokenizer()
    ids = theirs(text, add_special_tokens=False).input_ids
    comma = ids.index(theirs.convert_tokens_to_ids(",</w>"))
    assert comma + 1 < ROOM - comma_reach(ROOM)  # too far back to move anything
    rows = [ids[start : start + ROOM] for start in range(0, len(ids), ROOM)]
    marked = [[theirs.bos_token_id, *row, theirs.eos_token_id] for row in rows]
    padded = [row + [theirs.pad_token_id] * (MAX_TOKENS - len(row)) for row in marked]
    expected = make_text_model()(torch.tensor(padded)).last_hidden_state.flatten(0, 1)
    read = read_prompt(encoder, text, "long")
    assert (len(read.chunks), read.tokens, read.left_out) == (len(rows), len(ids), "")
    for syntax in ("long", "a1111"):
        (found,) = encode(encoder, [text], syntax)
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_text_that_fits_has_the_same_states_in_every_reading(encoder: TextEncoder) -> None:
    texts = ["a cat", "", "a dog, pain"]
    plain = encode(encoder, texts)
    assert torch.equal(torch.stack(plain), encoder.encode(texts))
    for syntax in ("long", "a1111"):
        for found, expected in zip(encode(encoder, texts, syntax), plain, strict=True):
            assert torch.equal(found, expected)


@torch.no_grad()
def test_brackets_cut_words_but_weights_of_one_change_nothing(encoder: TextEncoder) -> None:
    expected = encode(encoder, ["a cat (dog)"], "long")[0]
    found = encode(encoder, [r"a (cat:1) \(dog\)"], "a1111")[0]
    assert torch.equal(found, expected)


def test_a_weight_multiplies_its_own_states_and_keeps_the_mean() -> None:
    states = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.tensor([1.0, 1.0, 1.5, 0.2, 1.0, 1.0])
    found = emphasised(states, weights[1:].tolist())
    torch.testing.assert_close(found.mean(), states.mean())
    factors = (found / states).mean(1)
    torch.testing.assert_close(found, states * factors[:, None])
    torch.testing.assert_close(factors / factors[0], weights)
    half = emphasised(states.half(), weights[1:].tolist())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), found, atol=2e-3, rtol=2e-3)


def test_a_mean_that_is_rounding_is_not_restored() -> None:
    states = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    states -= states.mean(1, keepdim=True)  # as a LayerNorm without bias leaves them
    weights = torch.tensor([1.0, 1.0, 1.5, 0.2, 1.0, 1.0])
    found = emphasised(states, weights[1:].tolist())
    assert found.isfinite().all()
    ratio = found.norm() / (states * weights[:, None]).norm()
    assert 1 / 1.5 <= ratio <= 1 / 0.2


@torch.no_grad()
def test_weights_reach_the_tokens_of_their_words(encoder: TextEncoder) -> None:
    text = "a (cat:1.5) and then a lot of words BREAK [dog]"
    read = read_prompt(encoder, text, "a1111")
    tokens = [[encoder.tokenizer.backend.id_to_token(i) for i in c.ids] for c in read.chunks]
    heavy = [t for ids, c in zip(tokens, read.chunks, strict=True)
             for t, w in zip(ids, c.weights, strict=True) if w != 1]  # fmt: skip
    assert heavy == ["cat</w>", "dog</w>"]
    assert len(read.chunks) == 3 and tokens[2] == ["dog</w>"]
    light = text.replace("(cat:1.5)", "cat").replace("[dog]", "dog")
    plain, found = (encode(encoder, [t], "a1111")[0] for t in (light, text))
    scale = (found / plain).reshape(3, MAX_TOKENS, -1).median(-1).values
    scale = scale / scale[:, :1]
    cat = 1 + tokens[0].index("cat</w>")
    expected = torch.ones(3, MAX_TOKENS)
    expected[0, cat], expected[2, 1] = 1.5, 1 / 1.1
    torch.testing.assert_close(scale, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cat,dog,cat,dog,cat,dog,cat,painting,dog", "painting,dog"),  # tags without spaces
        ("cat\n" * 13 + "painting\tof a dog", "painting\tof a dog"),
        ("\u732b" * 40, "\u732b" * (40 - ROOM // 3)),  # three bytes a sign; the last is cut
        ("cat " * 11 + "\u732b\u304c dog", "\u304c dog"),
        ("x" * 20, "x" * 20),  # a word that is cut is named whole
        ("cat " * ROOM, ""),
        ("", ""),
    ],
)
def test_what_does_not_fit_begins_with_a_word(text: str, left: str, encoder: TextEncoder) -> None:
    assert read_prompt(encoder, text).left_out == left


def test_what_does_not_fit_is_named(encoder: TextEncoder) -> None:
    text = "cat " * 13 + "painting of a dog"
    read = read_prompt(encoder, text)
    assert read.left_out == "painting of a dog" and read.tokens == ROOM
    assert str(read) == f"{ROOM} tokens ({ROOM} fit into one); left out: 'painting of a dog'"
    with pytest.warns(UserWarning, match="cut off: 'painting of a dog'.*prompt_syntax='long'"):
        encode(encoder, [text])
    assert "in 2 chunks" in str(read_prompt(encoder, text, "long"))
    assert len(read_prompt(encoder, "cat " * 13, "long", room=5).chunks) == 3
    with pytest.raises(UserError, match="Did you mean 'a1111'"):
        read_prompt(encoder, text, "a111")
