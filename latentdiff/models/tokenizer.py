"""CLIP's tokenizer: text → a fixed number of token ids.

The work is done by the `tokenizers` library alone, which imports a hundred times faster than the
tokenizer classes of transformers and gives the same ids.
"""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.json_text import read_json
from latentdiff.models.added_tokens import (
    EOS,
    MARKS,
    Added,
    add_tokens,
    added_entries,
    stated_tokens,
    text_of,
)

if TYPE_CHECKING:
    from torch import Tensor

#: How CLIP cuts text before merging: marks, contractions, letters, single digits, the rest.
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


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
        marks = ("bos_token", "eos_token", "pad_token")
        self.begin_id, self.end_id, self.pad_id = (
            self._id(config.get(mark) or MARKS[mark]) for mark in marks
        )
        self.learned = learned_words(backend)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids of texts, (B, max_length) int64; warns with the words that do not fit."""
        import torch

        rows = [self._row(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def count(self, text: str) -> int:
        """How many ids a text needs, begin and end mark included."""
        return sum(map(len, self.pieces(text))) + 2

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        """The ids of a text without marks; those of a learned word of several vectors together."""
        ids = self._encode(text).ids
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
        marks = {name: text_of(self.config.get(name) or usual) for name, usual in MARKS.items()}
        entries = added_entries(self.backend)
        config = {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **{k: v for k, v in self.config.items() if k != "name_or_path"},
            **marks,
            "added_tokens_decoder": {str(index): entry for index, entry in entries.items()},
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", marks)
        base = self.backend.get_vocab_size(with_added_tokens=False)
        if words := {entry["content"]: index for index, entry in entries.items() if index >= base}:
            _write_json(folder / "added_tokens.json", words)

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

    def _encode(self, text: str) -> Any:
        # Halves of surrogate pairs, which the library refuses.
        whole = text.encode("utf-8", "replace").decode("utf-8")
        return self.backend.encode(whole, add_special_tokens=False)

    def _fit(self, text: str) -> tuple[list[int], str]:
        """The ids that have room between the marks, and the words that have not."""
        encoding = self._encode(text)
        ids, begin, word = list[int](), 0, None
        for token, (at, _), own in zip(
            encoding.ids, encoding.offsets, encoding.word_ids, strict=True
        ):
            # Scripts without spaces (category Lo) are one "word", of which each sign is one.
            if own != word or unicodedata.category(text[at]) == "Lo":
                begin, word = at, own
            ids += self.learned.get(token, (token,))
            if len(ids) > self.max_length - 2:
                return ids[: self.max_length - 2], text[begin:]
        return ids, ""

    def _id(self, token: Any) -> int:
        found = self.backend.token_to_id(text_of(token))
        if found is None:
            raise UserError(
                f"the tokenizer's vocabulary does not hold its mark {text_of(token)!r}."
            )
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
    Raises:  UserError: neither form is there, it is damaged, or an added word cannot have its id.
    """
    folder = Path(folder)
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in form) for form in forms):
        raise UserError(
            f"no tokenizer at {folder}: it must hold tokenizer.json, or vocab.json and merges.txt."
        )
    config = _optional(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _optional(folder / "special_tokens_map.json")
    try:
        added = stated_tokens(config, _optional(folder / "added_tokens.json"))
        backend = _read_backend(folder, config, added)
        return ClipTokenizer(backend, config, stated_length(config, max_length))
    except UserError as error:
        raise UserError(f"the tokenizer in {folder} cannot be used: {error}") from error
    except Exception as error:  # the library raises plain exceptions for broken files
        raise UserError(f"the tokenizer in {folder} cannot be read: {error!r}") from error


def stated_length(config: Mapping[str, Any], max_length: int) -> int:
    """Ids per text: what a configuration says (transformers: 10^30 for no limit), or less."""
    length = int(min(config.get("model_max_length") or max_length, max_length))
    if length < 3:
        raise UserError(f"model_max_length must be at least 3, marks included; got {length}.")
    return length


def _read_backend(folder: Path, config: Mapping[str, Any], added: Sequence[Added]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    if (whole := folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(whole))
        add_tokens(backend, added)
        return backend
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    bpe = BPE.from_file(*files, unk_token=EOS, end_of_word_suffix="</w>")
    return build_backend(bpe, config, added)


def build_backend(model: Any, config: Mapping[str, Any], added: Sequence[Added]) -> Any:
    """CLIP's tokenizer around its vocabulary and merges, a `tokenizers.models.BPE`.

    Args: config: names begin and end mark.  added: words and marks, see `added_tokens`.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps
    from tokenizers.processors import RobertaProcessing

    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = Steps(
        [Split(Regex(PIECES), "removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, added)
    marks = (text_of(config.get(name) or MARKS[name]) for name in ("eos_token", "bos_token"))
    end, begin = ((mark, tokenizer.token_to_id(mark)) for mark in marks)
    tokenizer.post_processor = RobertaProcessing(
        end, begin, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
