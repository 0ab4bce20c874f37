import torch
from torch import Tensor

from latentdiff.train.batches import CHUNK, LARGE_CHUNK, ContextCache


class Encoder:
    """Gives every caption its length and counts the calls."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def encode(self, captions: list[str]) -> Tensor:
        self.seen.append(captions)
        return torch.tensor([[[float(len(c))] * 4] * 2 for c in captions])


def test_each_caption_is_encoded_once_and_comes_back_in_order() -> None:
    encoder = Encoder()
    cache = ContextCache(encoder.encode)
    first = cache(["a", "bbb", "a", ""])
    assert first[:, 0, 0].tolist() == [1, 3, 1, 0]
    assert torch.equal(cache(["", "bbb"]), first[[3, 1]])
    assert len(encoder.seen) == 1


def test_the_encoder_always_sees_batches_of_one_size() -> None:
    encoder = Encoder()
    cache = ContextCache(encoder.encode)
    cache([str(i) for i in range(11)])
    cache(["another"])
    assert [len(batch) for batch in encoder.seen] == [CHUNK] * 3


def test_a_gpu_gets_larger_batches() -> None:
    encoder = Encoder()
    ContextCache(encoder.encode, torch.device("cuda"))([str(i) for i in range(LARGE_CHUNK + 1)])
    assert [len(batch) for batch in encoder.seen] == [LARGE_CHUNK] * 2


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    encoder = Encoder()
    cache = ContextCache(encoder.encode, max_bytes=3 * 2 * 4 * 4)
    cache(["a", "b", "c"])
    cache(["a"])
    cache(["d"])
    assert len(cache) == 3
    calls = len(encoder.seen)
    cache(["a", "c", "d"])
    assert len(encoder.seen) == calls
    cache(["b"])
    assert len(encoder.seen) == calls + 1
