"""Properties of the U-Net that need no oracle."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.models.attention import Attention
from latentdiff.models.time_embedding import FourierFeatures, SinusoidalFeatures
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from tests.random_models import UNET

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
T = torch.tensor([10, 900])


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(**UNET)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
        {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        | {"mid_block_type": None, "addition_embed_type": "text"}
        | {"addition_embed_type_num_heads": 8},
    ],
    ids=["attention", "and pooled", "pooled alone"],
)
def test_projected_context_gives_the_same_bits(changes: dict[str, Any]) -> None:
    unet = UNet(UNetConfig(**UNET | changes)).eval()
    with torch.no_grad():
        expected = unet(X, T, CONTEXT)
        kv = unet.project_context(CONTEXT)
        assert torch.equal(unet(X, T, kv=kv), expected)
        assert torch.equal(unet(X, T, None, kv=kv), expected)
        assert not torch.equal(unet(X, T, CONTEXT.flip(0)), expected)
    with pytest.raises(UserError, match="same batch size; got 1 and 2"):
        unet(X[:1], T[:1], kv=kv)


def test_projected_context_is_not_projected_again() -> None:
    calls = []
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 3}
    unet, names = UNet(UNetConfig(**UNET | pooled)), ("attn2.to_k", "attn2.to_v", "pool.q_proj")
    layers = [m for n, m in unet.named_modules() if n.endswith(names)]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    kv = unet.project_context(CONTEXT)
    assert len(calls) == len(layers) > 0
    for t in (900, 500, 0):
        unet(X, t, kv=kv)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(layers)


def test_gradient_checkpointing_changes_no_gradient(unet: UNet) -> None:
    plain, saving = copy.deepcopy(unet).train(), copy.deepcopy(unet).train()
    saving.enable_gradient_checkpointing()
    for model in (plain, saving):
        model(X, T, CONTEXT).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert b.grad is not None and a.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0, msg=name)


def test_gradient_checkpointing_recomputes(unet: UNet) -> None:
    model = copy.deepcopy(unet).train()
    model.enable_gradient_checkpointing()
    calls = []
    model.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(X, T, CONTEXT).sum().backward()
    assert len(calls) == 2


def test_channels_last_is_equal(unet: UNet) -> None:
    turned = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = turned(X.to(memory_format=torch.channels_last), T, CONTEXT)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, unet(X, T, CONTEXT), rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_are_independent(unet: UNet) -> None:
    with torch.no_grad():
        together = unet(X, T, CONTEXT)
        alone = unet(X[1:], T[1:], CONTEXT[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


def test_timestep_forms(unet: UNet) -> None:
    with torch.no_grad():
        expected = unet(X, torch.tensor([7, 7]), CONTEXT)
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7])):
            assert torch.equal(unet(X, t, CONTEXT), expected)
        assert not torch.equal(unet(X, 7.5, CONTEXT), expected)


def test_bfloat16_follows_float32(unet: UNet) -> None:
    with torch.no_grad():
        expected = unet(X, T, CONTEXT)
        half = copy.deepcopy(unet).to(torch.bfloat16)(X.bfloat16(), T, CONTEXT).float()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = unet(X, T, CONTEXT).float()
    for found in (half, mixed):
        assert (found - expected).norm() / expected.norm() < 0.05


def test_init_for_training_predicts_zero_and_learns(unet: UNet) -> None:
    fresh = UNet(UNetConfig(**UNET)).init_for_training()
    out = fresh(X, T, CONTEXT)
    assert torch.count_nonzero(out) == 0
    (out - X).square().mean().backward()
    assert fresh.conv_out.weight.grad is not None and fresh.conv_out.weight.grad.abs().sum() > 0


def test_fourier_frequencies_stay_float32() -> None:
    features = FourierFeatures(32)
    before = features.weight.clone()
    unet = UNet(UNetConfig(**UNET, time_embedding_type="fourier"))
    assert unet.half().time_proj.weight.dtype == torch.float32
    assert torch.equal(features.to(torch.bfloat16).weight, before)
    assert not features.weight.requires_grad


def test_fourier_features_of_neighbours_are_similar() -> None:
    torch.manual_seed(0)
    a, b, far = FourierFeatures(256)(torch.tensor([500, 501, 900]))
    assert torch.cosine_similarity(a, b, dim=0) > 0.97
    assert torch.cosine_similarity(a, far, dim=0) < 0.5


def test_sinusoidal_features_closed_form() -> None:
    found = SinusoidalFeatures(4)(torch.tensor([2.5]))[0]
    angle = torch.tensor([2.5, 2.5 / 100])  # ω = 10000^(0), 10000^(−1/2)
    torch.testing.assert_close(found, torch.cat([angle.cos(), angle.sin()]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("only_cross_attention", True),
        ("resnet_time_scale_shift", "ada_group"),
        ("time_cond_proj_dim", 256),
        ("encoder_hid_dim_type", "image_proj"),
        ("a_new_field", 3),
        ("num_attention_heads", 8),
        ("act_fn", "gelu"),
    ],
)
def test_unsupported_fields_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        UNet.from_config(UNET | {field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"down_block_types": ("CrossAttnDownBlock2D", "DownBlok2D")},
            "Did you mean 'DownBlock2D'",
        ),
        (
            {"up_block_types": ("UpBlock2D",)},
            "one entry for each of the 2",
        ),
        ({"norm_num_groups": 7}, "multiple of norm_num_groups"),
        ({"attention_head_dim": 5}, "multiple of attention_head_dim"),
        (
            {"addition_embed_type": "text"},
            r"multiple of addition_embed_type_num_heads \(64\); got 24",
        ),
    ],
)
def test_inconsistent_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNetConfig(**(UNET | changes))


def test_wrong_context(unet: UNet) -> None:
    with pytest.raises(UserError, match="cross_attention_dim"):
        unet(X, T, torch.zeros(2, 5, 32))
    with pytest.raises(UserError, match="same batch size"):
        unet(X, T, CONTEXT[:1])
    with pytest.raises(UserError, match="needs context"):
        unet(X, T)


def test_xformers_not_installed(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(UserError, match=r"cannot be imported.*pip install"):
        unet.set_attention("xformers")


def fake_xformers(monkeypatch: pytest.MonkeyPatch, attention: Any) -> None:
    package, operators = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    operators.memory_efficient_attention = attention  # type: ignore[attr-defined]
    package.ops = operators  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)


def test_xformers_has_no_operator_for_cpu(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers(monkeypatch, None)
    with pytest.raises(UserError, match="on cpu and xformers has operators for CUDA only"):
        unet.set_attention("xformers")


def test_xformers_kernels_do_not_load() -> None:
    from latentdiff.models.attention import memory_efficient

    def fail(*_: Any) -> None:
        raise NotImplementedError("xFormers wasn't build with CUDA support")

    operators = types.SimpleNamespace(memory_efficient_attention=fail)
    query = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match=r"no kernel.*wasn't build with CUDA support"):
        memory_efficient(operators, query, query, query)


def test_xformers_layout_equals_sdpa() -> None:
    """xformers wants (B, tokens, heads, dim); a stand-in of that layout gives sdpa's answer."""
    from latentdiff.models.attention import memory_efficient, sdpa

    def stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    operators = types.SimpleNamespace(memory_efficient_attention=stand_in)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    torch.testing.assert_close(memory_efficient(operators, q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize("tokens", [16, 65])  # products, and more pairs than they are used for
def test_training_on_a_cpu_computes_the_same_attention(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentdiff.models import attention as attention_backend
    from latentdiff.models.attention import sdpa

    plain: list[int] = []
    kept = attention_backend.products

    def products(*given: torch.Tensor) -> torch.Tensor:
        plain.append(1)
        return kept(*given)

    monkeypatch.setattr(attention_backend, "products", products)
    given = [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (tokens, 65, 65)]
    q, k, v = (x.requires_grad_() for x in given)
    weights = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1)
    wanted, pull = weights @ v, torch.randn(2, 3, tokens, 8, dtype=torch.float64)
    for ours, theirs in zip(
        (sdpa(q, k, v), *torch.autograd.grad(sdpa(q, k, v), (q, k, v), pull)),
        (wanted, *torch.autograd.grad(wanted, (q, k, v), pull)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert bool(plain) == (tokens == 16)
    plain.clear()
    with torch.no_grad():
        torch.testing.assert_close(sdpa(q, k, v), wanted)
    assert not plain


def test_products_are_as_exact_as_the_kernel_in_half_precision() -> None:
    from latentdiff.models.attention import products

    torch.manual_seed(0)
    q, k, v = 3 * torch.randn(3, 4, 3, 64, 40)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    halves = [x.bfloat16() for x in (q, k, v)]
    kernel = torch.nn.functional.scaled_dot_product_attention(*halves)
    with torch.autocast("cpu", torch.bfloat16):
        ours = products(*halves)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() < 1.1 * (kernel.float() - exact).abs().mean()


def test_unknown_attention(unet: UNet) -> None:
    with pytest.raises(UserError, match="Did you mean 'sdpa'"):
        unet.set_attention("spda")


def test_cross_attentions_are_numbered_once(unet: UNet) -> None:
    numbers = [m.index for n, m in unet.named_modules() if n.endswith("attn2")]
    assert numbers == list(range(len(numbers)))
    assert all(isinstance(m, Attention) for n, m in unet.named_modules() if n.endswith("attn1"))
