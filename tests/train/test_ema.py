import torch
from torch import nn

from latentdiff.train.ema import Ema, decay_at


def test_average_is_the_weighted_sum_of_all_weights() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.9)
    expected = module.weight.detach().clone()
    for step in range(40):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)


def test_warm_up_forgets_the_first_weights_and_ends_at_the_decay() -> None:
    assert decay_at(0, 0.999) == 0.1
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(5, 0.0) == 0.0


def test_applied_lends_the_average_and_gives_the_weights_back_bit_for_bit() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(module, decay=0.5)
    with torch.no_grad():
        module.weight.mul_(3)
    ema.update(100)
    before = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, ema.average["weight"].bfloat16())
        assert not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)
