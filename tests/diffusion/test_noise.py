import torch

from latentdiff.diffusion.noise import batch_noise, image_noise, mix, step_noise


def test_initial_noise_is_torch_randn_under_the_seed() -> None:
    expected = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(7))
    assert torch.equal(image_noise(7, (4, 8, 8)), expected)


def test_an_image_keeps_its_noise_in_any_batch() -> None:
    whole, alone = step_noise([5, 6, 7], (4, 8, 8)), step_noise([6], (4, 8, 8))
    for step in (0, 3, 999):
        assert torch.equal(whole(step)[1], alone(step)[0])
    assert torch.equal(batch_noise([5, 6], (4, 8, 8))[1], image_noise(6, (4, 8, 8)))


def test_steps_and_neighbouring_seeds_are_uncorrelated() -> None:
    fields = [image_noise(seed, (100_000,)) for seed in (0, 1)]
    fields += [image_noise(seed, (100_000,), step) for seed in (0, 1) for step in (0, 1)]
    correlation = torch.corrcoef(torch.stack(fields)) - torch.eye(len(fields))
    assert correlation.abs().max() < 5 / 100_000**0.5


def test_mix_spreads_neighbours() -> None:
    values = {mix(seed, index) for seed in range(100) for index in range(100)}
    assert len(values) == 10_000
    assert len({value & 0xFFFFFFFF for value in values}) > 9_990
    flips = [(mix(3, index) ^ mix(3, index + 1)).bit_count() for index in range(1000)]
    assert 31 < sum(flips) / len(flips) < 33
    assert mix(1, 2) != mix(2, 1) and 0 <= mix(-5, -7) < 2**64
