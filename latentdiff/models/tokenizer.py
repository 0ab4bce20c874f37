"""CLIP's tokenizer: text → a fixed number of token ids.

The work is done by the `tokenizers` library alone, which imports a hundred times faster than the
tokenizer classes of transformers and gives the same ids.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
#: How CLIP cuts text before merging: marks, contractions, letters, single digits, the rest.
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ClipTokenizer:
    """Text to ids: begin mark, byte pairs, end mark, padding."""

    def __init__(self, backend: Any, config: dict[str, Any], max_length: int) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:    backend: adds begin and end marks itself.
                 config: tokenizer_config.json; pad_token is read from it.
                 max_length: ids per text, marks included.
        """
        self.backend, self.config, self.max_length = backend, config, max_length
        backend.no_padding()
        backend.no_truncation()
        self.begin_id = self._id(config.get("bos_token", BOS))
        self.end_id = self._id(config.get("eos_token", EOS))
        self.pad_id = self._id(config.get("pad_token", EOS))
        self.learned = learned_words(backend)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids of texts, (B, max_length) int64; warns with the words that do not fit."""
        rows = [self._row(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def count(self, text: str) -> int:
        """How many ids a text needs, begin and end mark included."""
        return sum(map(len, self.pieces(text))) + 2

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        """The ids of a text without marks; those of a learned word of several vectors together."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.learned.get(token, (token,)) for token in ids]

    def padded(self, ids: Sequence[int]) -> list[int]:
        """A row of max_length ids: begin mark, at most max_length - 2 ids, end mark, padding."""
        row = [self.begin_id, *ids, self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def left_out(self, text: str) -> str:
        """The words from the one on that no longer fits; empty when all do."""
        return self._fit(text)[1]

    def save(self, folder: Path) -> None:
        """Write every form that readers of a Stable Diffusion folder look for."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        self.backend.model.save(str(folder))  # vocab.json and merges.txt
        marks = {name: _text(self.config.get(name, EOS)) for name in _MARKS}
        marks["bos_token"] = _text(self.config.get("bos_token", BOS))
        config = {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **{k: v for k, v in self.config.items() if k != "name_or_path"},
            **marks,
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", marks)

    def _row(self, text: str) -> list[int]:
        ids, left_out = self._fit(text)
        if left_out:
            warnings.warn(
                f"the text encoder takes {self.max_length} tokens and this prompt has "
                f"{self.count(text)}; cut off: {left_out!r} (prompt_syntax='long', or generate.py "
                "--long, takes them all)",
                stacklevel=4,
            )
        return self.padded(ids)

    def _fit(self, text: str) -> tuple[list[int], str]:
        """The ids that have room between the marks, and the words that have not."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            ids += self.learned.get(token, (token,))
            if len(ids) > self.max_length - 2:
                begin = text.rfind(" ", 0, start + 1) + 1  # the word that token belongs to
                return ids[: self.max_length - 2], text[begin:]
        return ids, ""

    def _id(self, token: Any) -> int:
        found = self.backend.token_to_id(_text(token))
        if found is None:
            raise UserError(f"the tokenizer's vocabulary does not hold its mark {_text(token)!r}.")
        return found


def learned_words(backend: Any) -> dict[int, tuple[int, ...]]:
    """Added tokens that stand for several: id → its own and those of NAME_1, NAME_2, …

    This is how diffusers names the vectors of one learned word.
    """
    ids = {
        token.content: index
        for index, token in backend.get_added_tokens_decoder().items()
        if not token.special
    }
    found = {name: [ids[name]] for name in ids}
    for name, own in found.items():
        while (following := f"{name}_{len(own)}") in ids:
            own.append(ids[following])
    return {own[0]: tuple(own) for own in found.values() if len(own) > 1}


def load_tokenizer(folder: str | Path, max_length: int) -> ClipTokenizer:
    """Read a tokenizer folder: tokenizer.json, or vocab.json and merges.txt as in SD 1.x.

    Args:    max_length: what the text encoder has positions for; the folder may say less.
    Raises:  UserError: neither form is there.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    folder = Path(folder)
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        bpe = BPE.from_file(*files, unk_token=EOS, end_of_word_suffix="</w>")
        backend = build_backend(bpe, config)
    else:
        raise UserError(
            f"no tokenizer at {folder}: it must hold tokenizer.json, or vocab.json and merges.txt."
        )
    stated = int(min(config.get("model_max_length") or max_length, max_length))
    return ClipTokenizer(backend, config, stated)


def build_backend(model: Any, config: dict[str, Any]) -> Any:
    """CLIP's tokenizer around its vocabulary and merges, a `tokenizers.models.BPE`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.processors import RobertaProcessing

    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), "removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = (_text(config.get(k, d)) for k, d in (("bos_token", BOS), ("eos_token", EOS)))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (bos, eos)]
    )
    end, begin = ((t, tokenizer.token_to_id(t)) for t in (eos, bos))
    tokenizer.post_processor = RobertaProcessing(
        end, begin, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _text(token: Any) -> str:
    """The token of an entry that is text or, in older files, an object."""
    return token["content"] if isinstance(token, dict) else str(token)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
