"""CLIP's tokenizer: text → a fixed number of token ids.

The work is done by the `tokenizers` library alone, which imports a hundred times faster than the
tokenizer classes of transformers and gives the same ids.

Folders say the tokens beside the vocabulary (special tokens, and learned words) in up to four
files. As transformers (PreTrainedTokenizerBase.from_pretrained):

    tokenizer_config.json    added_tokens_decoder, id → token: where it is there, it says all
    added_tokens.json        word → id, in older folders
    tokenizer.json           added_tokens
    both of the first, and special_tokens_map.json    special tokens, extra ones too

A token gets the next free id unless it is in the vocabulary.

The vocabulary of OpenAI's CLIP, which single files of Stable Diffusion 1.x and 2.x rely on, follows
from 48,894 merges alone: every byte, every byte at a word's end, every merge, begin and end token.
Source of assets/clip_merges.txt.gz: lines 2 to 48895 of clip/bpe_simple_vocab_16e6.txt.gz in
github.com/openai/CLIP (MIT licence, Copyright 2021 OpenAI).
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, warn, whole_text
from latentdiff.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
#: Special tokens that every tokenizer of CLIP has, and what they are where a folder does not say.
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
#: (the id that is stated for it, a tokenizers.AddedToken)
Added = tuple[int | None, Any]


def text_of(token: Any) -> str:
    """The token of an entry that is text or, in older files, an object."""
    return token["content"] if isinstance(token, dict) else str(token)


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each of `SPECIAL_TOKENS` in a tokenizer_config.json."""
    return {name: text_of(config.get(name) or usual) for name, usual in SPECIAL_TOKENS.items()}


def stated_tokens(config: Mapping[str, Any], words: Mapping[str, int]) -> list[Added]:
    """What a folder adds, in the order of the ids; special tokens, without ids, are the last.

    Args:    config: tokenizer_config.json over special_tokens_map.json.
             words: added_tokens.json.
    """
    special = [config.get(name) or usual for name, usual in SPECIAL_TOKENS.items()]
    for more in map(config.get, _EXTRA):
        special += more.values() if isinstance(more, dict) else more or ()
    entries = config.get("added_tokens_decoder")
    if entries is None:
        texts = set(map(text_of, special))
        entries = {i: {"content": word, "special": word in texts} for word, i in words.items()}
    stated = sorted(((int(i), added_token(e)) for i, e in entries.items()), key=lambda one: one[0])
    return [*stated, *((None, added_token(one, special=True)) for one in special)]


def added_token(entry: Any, **changes: bool) -> Any:
    """A `tokenizers.AddedToken` of an entry: text, or an object with its fields."""
    from tokenizers import AddedToken

    given = {"content": entry} if isinstance(entry, str) else entry
    rules = {name: given[name] for name in _FIELDS[1:] if name in given}
    return AddedToken(given["content"], **(rules | changes))


def add_tokens(backend: Any, tokens: Iterable[Added]) -> None:
    """Add tokens to a `tokenizers.Tokenizer`, but for those that it has already.

    Raises: UserError: one gets another id than the one stated, which stands for its embedding.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for stated, token in tokens:
        if token.content not in known:
            backend.add_tokens([token])
            known.add(token.content)
        found = backend.token_to_id(token.content)
        if stated not in (None, found):
            raise UserError(
                f"the added word {token.content!r} has the id {stated} in it, where a tokenizer of "
                f"this vocabulary gives {found}. Ids of added words follow the vocabulary without "
                "gaps; correct those in added_tokens.json or tokenizer_config.json."
            )


def added_entries(backend: Any) -> dict[int, dict[str, Any]]:
    """Every token beside the vocabulary, special ones too, as JSON keeps it: id → its fields."""
    tokens = sorted(backend.get_added_tokens_decoder().items())
    return {i: {name: getattr(token, name) for name in _FIELDS} for i, token in tokens}


#: How CLIP cuts text before merging: BOS, EOS, contractions, letters, single digits, the rest.
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Text to ids: begin token, byte pairs, end token, padding."""

    def __init__(self, backend: Any, config: dict[str, Any], max_length: int) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:    backend: adds begin and end token itself.
                 config: tokenizer_config.json; pad_token is read from it.
                 max_length: ids per text, begin and end token included.
        """
        self.backend, self.config, self.max_length = backend, config, max_length
        backend.no_padding()
        backend.no_truncation()
        special = special_tokens_of(config)
        self.begin_id, self.end_id, self.pad_id = (
            self._id(special[name]) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.learned = learned_words(backend)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids of texts, (B, max_length) int64; warns with the words that do not fit."""
        import torch

        rows = []
        for text in texts:
            ids, left_out = self.fit(text)
            self.warn_of_cut(text, left_out)
            rows.append(self.padded(ids))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def count(self, text: str) -> int:
        """How many ids a text needs, begin and end token included."""
        return sum(map(len, self.pieces(text))) + 2

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        """The ids of a text without BOS and EOS; those of one learned word stay together."""
        ids = self._encode(text).ids
        return [self.learned.get(token, (token,)) for token in ids]

    def padded(self, ids: Sequence[int]) -> list[int]:
        """A row of max_length ids: begin token, at most max_length - 2 ids, end token, padding."""
        row = [self.begin_id, *ids, self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def fit(self, text: str) -> tuple[list[int], str]:
        """The ids that have room between begin and end token, and the words that have not."""
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

    def warn_of_cut(self, text: str, left_out: str) -> None:
        """Warn of the words of a text that are left out, if any; see `fit`."""
        if left_out:
            warn(
                f"the text encoder takes {self.max_length} tokens and this prompt has "
                f"{self.count(text)}; cut off: {left_out!r} (prompt_syntax='long', or "
                "latentdiff generate --long, takes them all)",
                text,
            )

    def save(self, folder: Path) -> None:
        """Write every form that readers of a Stable Diffusion folder look for."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        self.backend.model.save(str(folder))  # vocab.json and merges.txt
        special = special_tokens_of(self.config)
        entries = added_entries(self.backend)
        config = {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **{k: v for k, v in self.config.items() if k != "name_or_path"},
            **special,
            "added_tokens_decoder": {str(index): entry for index, entry in entries.items()},
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special)
        base = self.backend.get_vocab_size(with_added_tokens=False)
        if words := {entry["content"]: index for index, entry in entries.items() if index >= base}:
            write_json(folder / "added_tokens.json", words)

    def _encode(self, text: str) -> Any:
        return self.backend.encode(whole_text(text), add_special_tokens=False)

    def _id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(
                f"the tokenizer's vocabulary does not hold its special token {token!r}."
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
        raise UserError(
            f"model_max_length must be at least 3, begin and end token included; got {length}."
        )
    return length


def _read_backend(folder: Path, config: Mapping[str, Any], added: Sequence[Added]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    if (whole := folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(whole))
        add_tokens(backend, added)
        return backend
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return with_special_tokens(byte_pairs(*BPE.read_file(*files)), config, added)


def byte_pairs(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """CLIP's way from a text to pieces, a `tokenizers.Tokenizer` without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    bpe = models.BPE(vocabulary, merges, unk_token=EOS, end_of_word_suffix="</w>")
    tokenizer: Any = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_special_tokens(tokenizer: Any, config: Mapping[str, Any], added: Sequence[Added]) -> Any:
    """Add tokens to `byte_pairs`, and let it put begin and end token around every text.

    Args: config: names begin and end token.  added: see `stated_tokens`.
    """
    from tokenizers.processors import RobertaProcessing

    add_tokens(tokenizer, added)
    special = special_tokens_of(config)
    end, begin = (
        (token, tokenizer.token_to_id(token))
        for token in (special["eos_token"], special["bos_token"])
    )
    tokenizer.post_processor = RobertaProcessing(
        end, begin, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


MERGES: Path = Path(__file__).parents[1] / "assets" / "clip_merges.txt.gz"
#: The one key of a description that stands for this vocabulary.
CLIP = "clip"


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The merges, most frequent first."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    return tuple((a, b) for a, b in (line.split() for line in lines))


@cache
def clip_vocabulary() -> dict[str, int]:
    """Token → id."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in clip_merges()] + [BOS, EOS]
    return {word: number for number, word in enumerate(words)}


def clip_tokenizer(
    pad_token: str, max_length: int = 77, added: Sequence[Mapping[str, Any]] = ()
) -> ClipTokenizer:
    """CLIP's tokenizer.

    Args:    pad_token: <|endoftext|> in Stable Diffusion 1.x, ! in 2.x.
             max_length: ids per text, begin and end token included.
             added: words and special tokens beside those of CLIP, see `added_entries`.
    """
    config = SPECIAL_TOKENS | {"pad_token": pad_token}
    tokens = [*(added_token(mark, special=True) for mark in (BOS, EOS)), *map(added_token, added)]
    plain = byte_pairs(clip_vocabulary(), clip_merges())
    backend = with_special_tokens(plain, config, [(None, token) for token in tokens])
    return ClipTokenizer(backend, config, max_length)


def describe_tokenizer(tokenizer: ClipTokenizer) -> dict[str, Any]:
    """What `tokenizer_of` makes the same tokenizer of: CLIP's by its name, others as a whole."""
    if tokenizer.backend.get_vocab(with_added_tokens=False) == clip_vocabulary():
        pad = special_tokens_of(tokenizer.config)["pad_token"]
        entries = added_entries(tokenizer.backend).values()
        own = [entry for entry in entries if entry["content"] not in (BOS, EOS)]
        stated = {"pad_token": pad, "max_length": tokenizer.max_length}
        return {CLIP: stated | ({"added_tokens": own} if own else {})}
    config = {k: v for k, v in tokenizer.config.items() if k != "name_or_path"}
    return {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": config | {"model_max_length": tokenizer.max_length},
    }


def tokenizer_of(description: Mapping[str, Any], max_length: int) -> ClipTokenizer:
    """The tokenizer of a description.

    Args:    max_length: what the text encoder has positions for; the description may say less.
    Raises:  UserError: no such description.
    """
    from tokenizers import Tokenizer

    try:
        if CLIP in description:
            stated = description[CLIP]
            length = stated_length({"model_max_length": stated.get("max_length")}, max_length)
            return clip_tokenizer(str(stated["pad_token"]), length, stated.get("added_tokens", ()))
        config = dict(description["tokenizer_config.json"])
        backend = Tokenizer.from_str(description["tokenizer.json"])
        return ClipTokenizer(backend, config, stated_length(config, max_length))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"the file describes no tokenizer: {error!r}") from error
