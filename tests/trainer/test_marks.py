"""Words that stay legible: where the marks lie, that they arrive, who reads them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from random_models import make_text_model, make_tokenizer
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.trainer.marks import (
    SHARED,
    MarksConfig,
    least_used,
    mark_words,
    read_marks,
    token_of,
)

#: In the tiny vocabulary these two are tokens, and so is every letter.
WORDS = ("cat", "dog")
TEXTS = [
    f"{first} {second}{tail}"
    for first, second, tail in itertools.product(
        "abcdef", "uvwxyz", ("", " o cat", " o i dog", " cat", " dog k", " o n m l")
    )
]
READER = "mid_block.attentions.0"


@pytest.fixture
def text(tmp_path: Path) -> TextEncoder:
    make_text_model().save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path / "text", tmp_path / "tokenizer")
    encoder.module.float()
    return encoder


def make_unet(width: int, heads: int = 4) -> UNet:
    return UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(32, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            layers_per_block=1,
            attention_head_dim=heads,
            cross_attention_dim=width,
        )
    )


def last_residual(text: TextEncoder, ids: Tensor) -> Tensor:
    """What the final norm is given."""
    seen: list[Tensor] = []
    handle = text.module.final_layer_norm.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    text.module(ids)
    handle.remove()
    return seen[0]


def test_directions_are_orthonormal_and_no_norm_takes_them(text: TextEncoder) -> None:
    found = least_used(text.module, text.tokenizer(TEXTS), 3)
    assert torch.allclose(found.T @ found, torch.eye(3), atol=1e-5)
    assert float(found.sum(0).abs().max()) < 1e-3


@torch.no_grad()
def test_the_shared_mark_arrives_as_it_was_put_in(text: TextEncoder) -> None:
    ids = text.tokenizer(TEXTS)
    shared = least_used(text.module, ids, 3)[:, 0]
    tokens = mark_words(text, [WORDS], ids)[0]
    assert tokens == [token_of(text, word) for word in WORDS]
    along = last_residual(text, ids) @ shared
    marked = torch.isin(ids, torch.tensor(tokens))
    assert 0 < int(marked.sum()) < marked.numel() / 4
    rest = along[~marked].mean()
    assert torch.allclose(along[marked] - rest, torch.tensor(SHARED), atol=1e-2)
    assert float((along[~marked] - rest).abs().max()) < 1e-2


@torch.no_grad()
def test_a_head_finds_the_word_wherever_it_asks_from(text: TextEncoder) -> None:
    torch.manual_seed(0)
    ids = text.tokenizer(TEXTS)
    tokens = mark_words(text, [WORDS], ids)[0]
    states = text.encode(TEXTS).float()
    unet = make_unet(states.shape[2])
    assert read_marks(unet, [READER], states, ids, [tokens])[0] > 0.95
    block = unet.get_submodule(READER).transformer_blocks[0]
    attention, kv = block.attn2, block.attn2.project(states)
    out = attention.to_out[0]
    out.weight[:, 8:] = 0  # the first head alone
    x = block.norm2(torch.randn(len(TEXTS), 5, 32) * 3)
    said = attention(x, kv)
    assert torch.allclose(said, said[:, :1].expand_as(said), atol=1e-4)  # every place the same
    frame = out.weight[:, :8] / out.weight[:, :8].norm(dim=0)
    code = ((said[:, 0] - out.bias) @ frame)[:, :2] / out.weight[:, 0].norm()
    cat, dog = (torch.tensor([word in t.split() for t in TEXTS]) for word in WORDS)
    assert bool((code[cat, 0] > code[cat, 1] + 0.3).all())
    assert bool((code[dog, 1] > code[dog, 0] + 0.3).all())
    assert float(code[~cat & ~dog].abs().max()) < 0.3


@torch.no_grad()
def test_each_kind_of_words_has_a_head_of_its_own(text: TextEncoder) -> None:
    torch.manual_seed(0)
    texts = [f"{t.removesuffix(' cat').removesuffix(' dog k')} cat dog" for t in TEXTS[3:]]
    texts += TEXTS
    ids = text.tokenizer(texts)
    tokens = mark_words(text, [WORDS], ids)[0]
    states = text.encode(texts).float()
    unet = make_unet(states.shape[2])
    shares = read_marks(unet, [READER], states, ids, [tokens[:1], tokens[1:]])
    assert len(shares) == 2
    attention = unet.get_submodule(READER).transformer_blocks[0].attn2
    kv = attention.project(states)
    norm = unet.get_submodule(READER).transformer_blocks[0].norm2
    query = attention.to_q(norm(torch.randn(len(texts), 1, 32)))
    for head, token in enumerate(tokens):
        scores = torch.einsum("nc,ntc->nt", query[:, 0, head * 8 : head * 8 + 8], kv[0][:, head])
        has = (ids == token).any(1)
        looks = scores.argmax(1)[has]
        assert float((ids[has].gather(1, looks[:, None])[:, 0] == token).float().mean()) > 0.95
        assert float((scores.argmax(1)[~has] == 0).float().mean()) > 0.95


def test_a_word_of_several_tokens_is_refused(text: TextEncoder) -> None:
    with pytest.raises(UserError, match="'castle' must be one token"):
        token_of(text, "castle")


def test_heads_narrower_than_the_words_are_refused(text: TextEncoder) -> None:
    ids = text.tokenizer(TEXTS)
    tokens = mark_words(text, [WORDS], ids)[0]
    states = text.encode(TEXTS).float()
    with pytest.raises(UserError, match="at least 1 heads of 2 channels"):
        read_marks(make_unet(states.shape[2], heads=32), [READER], states, ids, [tokens])
    with pytest.raises(UserError, match="at least 2 heads of 1 channels"):
        kinds = [tokens[:1], tokens[1:]]
        read_marks(make_unet(states.shape[2], heads=1), [READER], states, ids, kinds)


def test_bad_words_are_named() -> None:
    assert MarksConfig(("red blue", "sketch")).validate() == []
    assert "empty" in MarksConfig(("red", " ")).validate()[0]
    assert "must differ; got red, red" in MarksConfig(("red", "red")).validate()[0]
