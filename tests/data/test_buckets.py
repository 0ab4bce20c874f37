"""Aspect-ratio buckets and loss masks, from the image to what a batch reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import sample_image
from PIL import Image
from test_latent_cache import StubAutoencoder, config_of

from latentdiff.data.encoder import Encoder, bucket_sizes, nearest
from latentdiff.data.images import latent_mask, to_tensor
from latentdiff.data.latents import LatentCache, build_latent_cache
from latentdiff.data.online import OnlineLatents
from latentdiff.data.source import DataConfig, open_source
from latentdiff.errors import UserError


@pytest.mark.parametrize(("size", "step", "ratio"), [(512, 64, 2.0), (64, 16, 2.0), (768, 64, 3.0)])
def test_bucket_sizes_fill_the_area(size: int, step: int, ratio: float) -> None:
    sizes = bucket_sizes(size, step, ratio)
    assert (size, size) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert max(height, width) / min(height, width) <= ratio
        # No longer side of the same breadth would fit.
        assert height * width <= size * size < (max(height, width) + step) * min(height, width)


def test_an_image_goes_to_the_nearest_shape() -> None:
    sizes = bucket_sizes(512, 64, 2.0)
    for height, width in sizes:
        assert sizes[nearest(sizes, 3 * width, 3 * height)] == (height, width)
    assert sizes[nearest(sizes, 1000, 10)] == sizes[-1]
    assert sizes[nearest(sizes, 10, 1000)] == sizes[0]


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [
        (600, 600, (512, 512)),
        (300, 200, (192, 256)),  # 1.5 : 1, which 256 and 192 cover most of
        (130, 500, (256, 128)),  # ratio 2 is the most
        (40, 30, (64, 64)),
    ],
)
def test_no_image_is_enlarged_unless_none_is_so_small(
    width: int, height: int, kept: tuple[int, int]
) -> None:
    config = DataConfig(path="x", image_size=512, buckets=True, bucket_step=64, no_upscale=True)
    encoder = Encoder(StubAutoencoder(), config)
    assert encoder.sizes[encoder.bucket(width, height)] == kept
    without = Encoder(StubAutoencoder(), dataclasses.replace(config, no_upscale=False))
    assert set(without.sizes) < set(encoder.sizes)
    if kept == (512, 512):
        assert without.sizes[without.bucket(width, height)] == kept


def bucketed(folder: Path, **options: object) -> DataConfig:
    folder.mkdir()
    for number, size in enumerate([(30, 30), (60, 24), (24, 60), (31, 30), (62, 25)]):
        sample_image(number, size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    settings = {"image_size": 16, "buckets": True, "bucket_step": 8, **options}
    return config_of(folder, **settings)


def build(config: DataConfig, cache: Path, model: StubAutoencoder | None = None) -> LatentCache:
    model = model or StubAutoencoder()
    return build_latent_cache(open_source(config), model, config, cache, progress=False)


def test_each_bucket_has_its_own_shape(tmp_path: Path) -> None:
    config = bucketed(tmp_path / "d", bucket_max_ratio=4.0)
    model = StubAutoencoder()
    cache = build(config, tmp_path / "c", model)
    assert [cache.shapes[b] for b in cache.buckets] == [
        (8, 4, 4), (8, 2, 8), (8, 8, 2), (8, 4, 4), (8, 2, 8)
    ]  # fmt: skip
    source = open_source(config)
    for index, size in ((1, (8, 32)), (2, (32, 8)), (3, (16, 16))):
        expected = model.conv(to_tensor(source[index].image, size)[None])[0]
        assert torch.allclose(cache.read([index]).moments[0].float(), expected, atol=2e-3)
    assert torch.equal(cache.read([4, 1]).moments[1], cache.read([1]).moments[0])
    with pytest.raises(ValueError, match="one bucket"):
        cache.read([0, 1])
    again = StubAutoencoder()
    assert build(config, tmp_path / "c", again).fingerprint() == cache.fingerprint()
    assert again.batches == []


def test_squares_in_the_same_cache_folder_are_kept_apart(tmp_path: Path) -> None:
    config = bucketed(tmp_path / "d", bucket_max_ratio=4.0)
    square = config_of(tmp_path / "d")
    build(square, tmp_path / "c")
    cache = build(config, tmp_path / "c")
    assert len(set(cache.buckets)) == 3
    assert build(square, tmp_path / "c").shape == (8, 4, 4)


def test_one_bucket_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one shape only.*bucket_step"):
        build(bucketed(tmp_path / "d"), tmp_path / "c")


def test_masks_are_cut_as_their_images_and_averaged() -> None:
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :16] = 255  # the left half of a wide image counts
    wide = Image.fromarray(mask)
    middle = latent_mask(wide, (32, 16), (16, 16), "center", (4, 4))
    assert middle[:, 0].min() > 0.95 and middle[:, 3].max() < 0.05
    assert torch.allclose(middle.mean(), torch.tensor(0.5), atol=0.03)
    padded = latent_mask(wide, (32, 16), (16, 16), "pad", (4, 4))
    assert padded[0].max() == padded[3].max() == 0  # padding counts nowhere
    assert padded[1:3, :2].min() > 0.9 and padded[1:3, 2:].max() < 0.1
    assert latent_mask(None, (32, 16), (16, 16), "center", (4, 4)).min() == 1
    half = latent_mask(Image.new("L", (8, 8), 128), (32, 16), (16, 16), "center", (4, 4))
    assert torch.allclose(half, torch.full((4, 4), 128 / 255), atol=1e-3)


@pytest.mark.parametrize("kind", ["alpha", "file"])
def test_masks_are_kept_beside_the_moments(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(3):
        image, mask = sample_image(number, (16, 16)), Image.new("L", (16, 16), 255)
        if number != 2:  # one image has none
            mask.paste(0, (8, 0, 16, 16))
            if kind == "alpha":
                image.putalpha(mask)
            else:
                mask.save(folder / f"{number}.mask.png")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    config = config_of(folder, loss_mask=kind)
    model = StubAutoencoder()
    cache = build(config, tmp_path / "c", model)
    assert len(cache) == 3
    moments, masks = cache.read([0, 2])
    assert moments.shape == (2, 8, 4, 4) and masks is not None and masks.shape == (2, 1, 4, 4)
    assert masks[0, 0, :, :2].min() > 0.95 and masks[0, 0, :, 2:].max() < 0.05
    assert bool((masks[1] == 1).all())
    assert torch.equal(moments[1], build(config_of(folder), tmp_path / "c").read([2]).moments[0])
    online = OnlineLatents(open_source(config), model, config)
    seen = online.read([0, 2])
    assert seen.mask is not None and torch.allclose(seen.mask, masks.float(), atol=1e-3)
    assert torch.allclose(seen.moments, moments.float(), atol=2e-3)
    if kind == "file":  # another mask is another row
        Image.new("L", (4, 4), 0).save(folder / "0.mask.png")
        changed = build(config, tmp_path / "c", model).read([0]).mask
        assert changed is not None and changed.max() == 0


def test_online_latents_cut_at_random_by_their_seed_and_pass_over_what_is_broken(
    tmp_path: Path,
) -> None:
    config = bucketed(tmp_path / "d", buckets=False, crop="random")
    (tmp_path / "d" / "3.png").write_bytes(b"no image")
    online = OnlineLatents(open_source(config), StubAutoencoder(), config)
    one, two, three = (online.read([1, 2], seeds).moments for seeds in ([1, 2], [3, 2], [1, 2]))
    assert torch.equal(one, three) and torch.equal(one[1], two[1])
    assert not torch.allclose(one[0], two[0], atol=1e-2)
    broken = online.read([3, 0])
    assert broken.mask is not None
    assert broken.mask[0].max() == 0 and broken.mask[1].min() == 1
    with pytest.raises(UserError, match="buckets=true needs the latent cache"):
        OnlineLatents(
            open_source(config), StubAutoencoder(), config_of(tmp_path / "d", buckets=True)
        )
