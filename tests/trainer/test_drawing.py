"""The text tower that learns to sketch."""

from pathlib import Path

import pytest
import torch
from random_models import MAX_TOKENS, make_text_model, make_tokenizer

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import load_text_encoder
from latentdiff.trainer.drawing import DrawingLesson, check_room, patches


def test_patches_are_cut_row_by_row() -> None:
    latents = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    cut = patches(latents, 2)
    assert cut.shape == (1, 6, 8)
    assert torch.equal(cut[0, 0].reshape(2, 2, 2), latents[0, :, :2, :2])
    assert torch.equal(cut[0, 1].reshape(2, 2, 2), latents[0, :, :2, 2:4])
    assert torch.equal(cut[0, 3].reshape(2, 2, 2), latents[0, :, 2:, :2])


def test_a_tower_learns_two_pictures_by_heart(tmp_path: Path) -> None:
    make_text_model().save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tower = load_text_encoder(tmp_path / "text", tmp_path / "tokenizer")
    tower.module.requires_grad_(True)
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 4, 4)
    lesson = DrawingLesson(tower, (4, 4, 4), 2)
    assert lesson.count == 4 < MAX_TOKENS
    captions = ["a cat", "a dog"]
    error, moved = lesson(captions, latents)
    assert float(moved) == pytest.approx(0, abs=1e-9)
    first = float(error.detach())
    optimizer = torch.optim.Adam(lesson.parameters(), lr=3e-3)
    for _ in range(150):
        error, moved = lesson(captions, latents)
        (error + 0.1 * moved).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(error.detach()) < 0.2 * first
    assert float(moved.detach()) < 0.5


def test_patches_that_do_not_fit_are_refused() -> None:
    check_room((8, 16, 16), 4, 32)
    with pytest.raises(UserError, match="must divide the latents' 16 x 16; got 5"):
        check_room((8, 16, 16), 5, 32)
    with pytest.raises(UserError, match="256 patches, and the text tower has 77 positions"):
        check_room((4, 64, 64), 4, 77)
