"""The CLIP trainer: vocabulary, loss, and what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from latentdiff.models.clip_text import load_text_encoder
from latentdiff.train.clip import (
    ClipConfig,
    build_clip,
    contrastive_loss,
    retrieval_accuracy,
    save_clip,
    train_tokenizer,
    trim_padding,
)
from latentdiff.train.log import read_metrics

SCRIPT = Path(__file__).parents[2] / "training" / "train_clip.py"
CAPTIONS = ["a red ball", "a blue square on the table", "the piñata", "seven o'clock", "a Cat!"]
SMALL = ClipConfig(
    vocabulary=600, max_tokens=12, text_width=32, text_layers=2, text_heads=2, image_width=32,
    image_layers=1, image_heads=2, patch_size=8, projection=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 4, SMALL.vocabulary, SMALL.max_tokens)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vocabulary_reads_the_same_in_transformers(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "", "日本 émoji  &   7th", "RED  ball", "a " * 40]
    ids = theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(texts))
    assert theirs.model_max_length == SMALL.max_tokens


def test_the_same_captions_give_the_same_vocabulary(tokenizer):
    for _ in range(10):  # ties are many among so few captions
        again = train_tokenizer(CAPTIONS * 4, SMALL.vocabulary, SMALL.max_tokens)
        assert again.backend.to_str() == tokenizer.backend.to_str()


def test_any_text_can_be_spelled(tokenizer):
    encoding = tokenizer.backend.encode("zyx ñ 9")
    spelled = "".join(encoding.tokens[1:-1]).replace("</w>", "")
    assert spelled == "zyx" + "Ã±" + "9"  # ñ is two bytes, shown by ByteLevel's letters
    assert tokenizer.backend.token_to_id("<|endoftext|>") not in encoding.ids[1:-1]


def test_loss_equals_its_formula_and_sharding_it_changes_nothing():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    logits = scale * images @ texts.T
    expected = -0.5 * (
        logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()
    )
    whole = contrastive_loss(images, texts, scale, images, texts, 0)
    halves = [
        contrastive_loss(images[i : i + 3], texts[i : i + 3], scale, images, texts, i)
        for i in (0, 3)
    ]
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(torch.stack(halves).mean(), expected)


def test_retrieval_counts_ranks():
    gallery = torch.eye(4)
    queries = torch.tensor([[1, 0, 0, 0], [0.9, 0.5, 0, 0], [1, 0, 0, 0.5], [0, 0, 0, 1.0]])
    assert retrieval_accuracy(queries, gallery, 1) == 0.5
    assert retrieval_accuracy(queries, gallery, 2) == 0.75


def test_trimming_changes_no_feature_and_the_text_tower_stands_alone(tokenizer, tmp_path):
    torch.manual_seed(0)
    clip = build_clip(SMALL, tokenizer, 16).eval()
    ids = tokenizer(["a red ball", "the piñata"])
    with torch.no_grad():
        whole = clip.get_text_features(ids).pooler_output
        short = clip.get_text_features(trim_padding(ids)).pooler_output
    assert trim_padding(ids).shape[1] < ids.shape[1]
    torch.testing.assert_close(whole, short, atol=1e-6, rtol=1e-5)
    tokenizer.save(tmp_path / "tokenizer")
    save_clip(clip, tmp_path)
    alone = load_text_encoder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    with torch.no_grad():
        states = clip.float().text_model(ids).last_hidden_state
    torch.testing.assert_close(alone.float().encode_tokens(ids), states)


@pytest.mark.slow
def test_script_learns_to_tell_images_apart_and_keeps_a_frozen_text_tower(image_folder, tmp_path):
    common = [
        sys.executable, str(SCRIPT), "data.kind=folder", f"data.path={image_folder}",
        "data.image_size=32", "clip.text_width=32", "clip.text_layers=1", "clip.image_width=32",
        "clip.image_layers=1", "clip.vocabulary=600", "loop.mixed_precision=no",
        "loop.batch_size=8", "loop.tensorboard=false", "optimizer.lr=3e-3",
        "optimizer.warmup_steps=5",
    ]  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    done = subprocess.run(
        [*common, f"output={first}", "loop.max_steps=80"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = read_metrics(first / "metrics.jsonl")[-20:]
    assert sum(row["batch_top1"] for row in last) / len(last) > 0.8
    subprocess.run(
        [*common, f"output={second}", f"start={first}", "freeze_text=true",
         "loop.max_steps=4"], check=True, capture_output=True,
    )  # fmt: skip
    weights = "text_encoder/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert (first / "clip/model.safetensors").read_bytes() != (
        second / "clip/model.safetensors"
    ).read_bytes()
