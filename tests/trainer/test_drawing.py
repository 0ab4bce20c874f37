"""The text tower that learns to draw."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from random_models import make_text_model, make_tokenizer
from torch import nn

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.models.tokenizer import load_tokenizer
from latentdiff.trainer.drawing import (
    DrawingConfig,
    PatchLesson,
    TowerConfig,
    WholeLesson,
    check_room,
    check_same_tower,
    new_tower,
    patches,
    rows_with_patches,
    short_rows,
)
from latentdiff.trainer.unfolding import fitted_reader, principal_head, ridge, unfolding

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "training")]

from teach_drawing import further_lesson  # noqa: E402

SHAPE = TowerConfig(width=64, layers=3, hidden=256, heads=2, max_tokens=20)
PICTURE = (3, 4, 4)  # two by two patches of side 2: 4 · (12 + 1) hidden units are enough
COUNT, END_TEXTS = 4, [f"a {w}" for w in ["cat", "dog", "fox", "owl", "castle", "rocket"]]


@pytest.fixture
def old(tmp_path: Path) -> TextEncoder:
    make_text_model().save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path / "text", tmp_path / "tokenizer")
    encoder.tokenizer.max_length = SHAPE.max_tokens
    return encoder


def test_patches_are_cut_row_by_row() -> None:
    latents = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    cut = patches(latents, 2)
    assert cut.shape == (1, 6, 8)
    assert torch.equal(cut[0, 0].reshape(2, 2, 2), latents[0, :, :2, :2])
    assert torch.equal(cut[0, 1].reshape(2, 2, 2), latents[0, :, :2, 2:4])
    assert torch.equal(cut[0, 3].reshape(2, 2, 2), latents[0, :, 2:, :2])


def test_short_rows_keep_the_text_and_one_end_mark_behind_it() -> None:
    end = 9
    ids = torch.tensor([[7, 1, 2, 9, 9, 9, 9, 9], [7, 1, 9, 9, 9, 9, 9, 9]])
    rows, positions, ends = short_rows(ids, end, torch.Generator().manual_seed(0))
    assert rows.tolist() == [[7, 1, 2, 9, 9], [7, 1, 9, 9, 9]]
    assert ends.tolist() == [3, 2]
    assert positions[:, :4].tolist() == [[0, 1, 2, 3]] * 2
    assert bool(((positions[:, 4] >= 4) & (positions[:, 4] < 8)).all())


def test_rows_with_patches_keep_the_last_positions() -> None:
    ids = torch.tensor([[7, 1, 9, 9, 9, 9, 9, 9, 9, 9]])
    rows, positions, ends = rows_with_patches(ids, 9, 3)
    assert positions.tolist() == [[0, 1, 2, 3, 7, 8, 9]]
    assert rows.tolist() == [[7, 1, 9, 9, 9, 9, 9]] and ends.tolist() == [2]


def test_a_tower_reads_rows_in_any_place_it_is_told(old: TextEncoder) -> None:
    tower = new_tower(SHAPE, 2, old.module, COUNT)
    ids = old.tokenizer(END_TEXTS)
    whole = torch.arange(ids.shape[1]).expand(len(ids), -1)
    assert torch.equal(tower(ids), tower(ids, whole))
    assert not torch.allclose(tower(ids), tower(ids, whole.flip(1)))


def learn(lesson: nn.Module, rows: object, pictures: torch.Tensor, steps: int) -> float:
    features = nn.functional.normalize(torch.randn(len(pictures), 8), dim=1)
    optimizer = torch.optim.Adam(lesson.parameters(), lr=2e-3)
    error = torch.tensor(0.0)
    for _ in range(steps):
        error, distance = lesson(rows, pictures, features)
        (error + 0.1 * distance).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(error.detach())


def test_both_lessons(old: TextEncoder) -> None:
    """The first is learnt by heart; the layer that unfolds begins near what it knew."""
    torch.manual_seed(0)
    pictures = torch.randn(len(END_TEXTS), *PICTURE)
    ids, end = old.tokenizer(END_TEXTS), old.tokenizer.end_id
    first = WholeLesson(new_tower(SHAPE, 2, old.module, COUNT), 48, 8)
    principal_head(first.head, pictures.flatten(1), unused=8)
    rows = short_rows(ids, end, torch.Generator().manual_seed(1))
    knew = learn(first, rows, pictures, 200)
    assert knew < 0.02

    second = PatchLesson(first.tower, 12, 8, 2)
    order = patches(torch.arange(48).view(1, *PICTURE), 2)[0]
    # Fitted on every text with every ending, so that the regressions have rows enough.
    texts = [
        f"{text} {word}" for text in END_TEXTS for word in ("", "a", "of", "on", "red", "blue")
    ]
    second.head = unfolding(first.tower, first.head, order, old.tokenizer(texts * 3))
    with torch.no_grad():
        error, _ = second(rows_with_patches(ids, end, COUNT), pictures, torch.zeros(1, 8))
    assert float(error) < 0.35 * float(pictures.var())
    assert learn(second, rows_with_patches(ids, end, COUNT), pictures, 100) < 0.05
    assert first.tower.config["num_hidden_layers"] == 3
    _gone_on_with(second, rows_with_patches(ids, end, COUNT), ids, pictures)


def _gone_on_with(
    lesson: PatchLesson, rows: object, ids: torch.Tensor, pictures: torch.Tensor
) -> None:
    """A tower that draws says so again through a head that is fitted anew, with no CLIP to keep."""
    again = PatchLesson(lesson.tower, 12, 8, 2)
    again.head = fitted_reader(lesson.tower, ids, patches(pictures, 2))
    with torch.no_grad():
        error, distance = again(rows, pictures, torch.empty(0, 8))
    assert float(error) < 0.05 and float(distance) == 0


def test_ridge_finds_a_linear_map() -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(200, 6), torch.randn(3, 6), torch.randn(3)
    found, shift = ridge(x, x @ weight.T + offset, 1e-9)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shift, offset, atol=1e-4, rtol=1e-4)


def test_patches_that_do_not_fit_are_refused() -> None:
    tower = TowerConfig()
    check_room((9, 16, 16), 4, tower)
    with pytest.raises(UserError, match="must divide the latents' 16 x 16; got 5"):
        check_room((9, 16, 16), 5, tower)
    with pytest.raises(UserError, match="256 patches, and the text tower has 40 positions"):
        check_room((4, 64, 64), 4, tower)
    with pytest.raises(UserError, match=r"tower\.hidden must be at least 2320 .* got 2048"):
        check_room((9, 16, 16), 4, TowerConfig(hidden=2048))


def test_going_on_with_another_tower_is_refused(old: TextEncoder, tmp_path: Path) -> None:
    c = old.module.config
    same = TowerConfig(
        c["hidden_size"],
        c["num_hidden_layers"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c["max_position_embeddings"],
    )
    check_same_tower(old, same, old.tokenizer, tmp_path)
    longer = dataclasses.replace(same, max_tokens=same.max_tokens + 3)
    text = f"tower.max_tokens={same.max_tokens} .not {same.max_tokens + 3}"
    with pytest.raises(UserError, match=text):
        check_same_tower(old, longer, old.tokenizer, tmp_path)
    other = load_tokenizer(EMBEDDED_MODEL / "tokenizer", 20)
    with pytest.raises(UserError, match="another vocabulary"):
        check_same_tower(old, same, other, tmp_path)


def test_going_on_keeps_no_clip(tmp_path: Path) -> None:
    config = DrawingConfig(clip_weight=0.1)
    with pytest.raises(UserError, match=r"clip_weight=0.1.*Set clip_weight=0"):
        further_lesson(tmp_path, None, torch.zeros(1, 3, 4, 4), config, 8)  # type: ignore[arg-type]
