"""A tensor's bytes do not depend on how it lies in memory."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.data.encoder import cache_key
from latentdiff.data.source import DataConfig
from latentdiff.finetune.method import Method
from latentdiff.weights import raw_bytes

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one of every four": lambda t: t.repeat_interleave(4, 1)[:, ::4],
    "second half of a larger one": lambda t: torch.cat([t, t])[len(t) :],
    "a parameter": torch.nn.Parameter,
}
SHAPES = [(5, 3, 3, 3), (5, 3, 1, 1), (5, 1, 1, 1), (1, 1, 1, 1), (0, 3, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_come_in_the_order_of_the_indices(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain = torch.randn(shape, dtype=dtype)
    whole = plain.view(torch.int16 if plain.itemsize == 2 else torch.int32).numpy().tobytes()
    assert bytes(raw_bytes(LAYOUTS[layout](plain))) == whole


def test_numbers_and_strided_singles_have_bytes_too() -> None:
    assert bytes(raw_bytes(torch.tensor(1.5))) == bytes(raw_bytes(torch.tensor([1.5])))
    assert bytes(raw_bytes(torch.tensor([1.5, 9, 9, 9])[::4])) == bytes(
        raw_bytes(torch.tensor(1.5))
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_digests_of_weights_are_those_of_any_layout(kernel: int) -> None:
    module = torch.nn.Conv2d(6, 4, kernel).requires_grad_(False)
    parts: Any = SimpleNamespace(unet=module, text_encoder=SimpleNamespace(encode=None))
    method = Method(parts)
    method.adds = True  # type: ignore[misc]
    before = method.facts(), cache_key(module, DataConfig())
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert (method.facts(), cache_key(module, DataConfig())) == before
    module.weight[0, 0, 0, 0] += 1
    assert method.facts() != before[0] and cache_key(module, DataConfig()) != before[1]
