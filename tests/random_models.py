"""Small models with random weights, made by diffusers and transformers: the oracle's side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 24
MAX_TOKENS = 16


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Every byte, every byte at a word's end, a few merges, the two marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "p a", "pa i", "pai n"]
    words = alphabet + [a + "</w>" for a in alphabet]
    words += [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    return {word: i for i, word in enumerate(words)}, merges


def make_tokenizer() -> Any:
    """transformers' CLIPTokenizer over `vocabulary`."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    vocab, merges = vocabulary()
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def write_plain_vocabulary(folder: Path, pad_token: str = EOS) -> None:
    """A tokenizer folder as SD 1.x has it: vocab.json and merges.txt, no tokenizer.json."""
    vocab, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "model_max_length": MAX_TOKENS,
        "bos_token": {"content": BOS, "__type": "AddedToken"},
        "eos_token": {"content": EOS, "__type": "AddedToken"},
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_text_model(seed: int = 0, **changes: Any) -> Any:
    """transformers' CLIPTextModel, two layers."""
    from transformers.models.clip.modeling_clip import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    vocab, _ = vocabulary()
    fields: dict[str, Any] = {
        "vocab_size": len(vocab),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[EOS],
    }
    return CLIPTextModel(CLIPTextConfig(**(fields | changes))).eval()


def make_vae(kind: str = "kl", seed: int = 0) -> Any:
    """diffusers' AutoencoderKL (one halving) or AutoencoderTiny (two), not flat when decoding."""
    torch.manual_seed(seed)
    if kind == "tiny":
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        stages = {"encoder": (1, 1, 1), "decoder": (1, 1, 1)}
        vae: Any = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=stages["encoder"],
            num_decoder_blocks=stages["decoder"],
        )
        last = vae.decoder.layers[-1]
    else:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.5,
        )
        last = vae.decoder.conv_out
    with torch.no_grad():
        last.weight *= 4
    return vae.eval()


UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
}


def make_unet(seed: int = 0, **changes: Any) -> Any:
    """diffusers' UNet2DConditionModel; attention strong enough that prompts matter."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**(UNET | changes)).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter *= 3
    return unet


def make_pipeline(vae_kind: str = "kl", scheduler: Any = None, **unet_changes: Any) -> Any:
    """A whole diffusers StableDiffusionPipeline of the models above."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = scheduler or DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=make_vae(vae_kind),
        text_encoder=make_text_model(),
        tokenizer=make_tokenizer(),
        unet=make_unet(**unet_changes),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
